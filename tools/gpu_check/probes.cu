// Rates of single instructions on all multiprocessors, and products that show how the accumulator rounds.
#include <iterator>

#include "products.h"

namespace attention_ext {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize, kBlocksPerSm = 4, kIterations = 4096;
constexpr int kChains = 8;  // of instructions that depend on each other

__device__ double total(double x) { return x; }
template <class T, int kCount>
__device__ double total(const T (&x)[kCount]) {
  double sum = 0;
  for (const T& one : x) sum += total(one);
  return sum;
}

// Or equal chains would be computed once.
template <class T, int kCount>
__device__ void make_unlike(T (&chains)[kChains][kCount]) {
  for (int i = 0; i < kChains; ++i) chains[i][0] = i;
}

// Each probe has kWork, the operations or bytes of a warp's step(), and a result that depends on every step.

template <class E>
struct Mma16 {
  static constexpr double kWork = kChains * 2.0 * 16 * 8 * 16;
  float c[kChains][4] = {};
  uint32_t a[4] = {thread_index() * 77u, 1, 2, 3}, b[2] = {4, 5};
  __device__ Mma16() { make_unlike(c); }
  __device__ void step() {
    for (auto& sums : c) multiply_16x8x16(E{}, sums, a, b);
  }
  __device__ double result() const { return total(c); }
};

struct MmaTf32 {
  static constexpr double kWork = kChains * 2.0 * 16 * 8 * 8;
  float c[kChains][4] = {};
  uint32_t a[4] = {thread_index() * 77u, 1, 2, 3}, b[2] = {4, 5};
  __device__ MmaTf32() { make_unlike(c); }
  __device__ void step() {
    for (auto& sums : c) multiply_16x8x8(sums, a, b);
  }
  __device__ double result() const { return total(c); }
};

struct Mma64 {
  static constexpr double kWork = kChains * 2.0 * 8 * 8 * 4;
  double c[kChains][2] = {}, a = thread_index(), b = 1e-9;
  __device__ Mma64() { make_unlike(c); }
  __device__ void step() {
    for (auto& sums : c) multiply_8x8x4(sums[0], sums[1], a, b);
  }
  __device__ double result() const { return total(c); }
};

struct LoadMatrices {
  static constexpr double kWork = kChains * 512.0;
  uint32_t sum = 0;
  __device__ void step() {
    const SharedAddress first = shared_address(shared_memory()) + thread_index() % kWarpSize * 16;  // no bank conflicts
    for (int i = 0; i < kChains; ++i) {
      uint32_t matrices[4];
      load_matrices(matrices, first + i * 512);
      sum ^= matrices[0] ^ matrices[1] ^ matrices[2] ^ matrices[3];
    }
  }
  __device__ double result() const { return sum; }
};

struct Exp2 {
  static constexpr double kWork = kChains * static_cast<double>(kWarpSize);
  float x[kChains] = {-0.1f * static_cast<float>(thread_index()), -1, -2, -3, -4, -5, -6, -7};
  __device__ void step() {
    for (float& power : x) power = exp2_of(power);
  }
  __device__ double result() const { return total(x); }
};

template <class Probe>
__global__ void __launch_bounds__(kThreads) repeat(double* result) {
  for (int i = thread_index(); i < kChains * 128; i += kThreads) reinterpret_cast<uint32_t*>(shared_memory())[i] = i;
  __syncthreads();
  Probe probe;
#pragma unroll 1
  for (int i = 0; i < kIterations; ++i) probe.step();
  result[blockIdx.x * static_cast<int64_t>(kThreads) + thread_index()] = probe.result();
}

__global__ void multiply_each(int bytes, bool is_bfloat16, const float* a, const float* b, float* c) {
  multiply_one(bytes, is_bfloat16, blockIdx.x, a, b, c);
}

struct Failure {
  cudaError_t error;
};

void check(cudaError_t error) {
  if (error != cudaSuccess) throw Failure{error};
}

template <class T>
struct Buffer {
  T* data = nullptr;
  size_t bytes;
  explicit Buffer(size_t count) : bytes(count * sizeof(T)) { check(cudaMalloc(&data, bytes)); }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
};

template <class Probe>
double rate() {
  int multiprocessors = 0, device = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const int blocks = kBlocksPerSm * multiprocessors;
  Buffer<double> result(static_cast<size_t>(blocks) * kThreads);
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  float best = 0;
  for (int i = 0; i < 5; ++i) {
    check(cudaEventRecord(begin));
    repeat<Probe><<<blocks, kThreads, kChains * 512>>>(result.data);
    check(cudaGetLastError());
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    best = i == 0 || milliseconds < best ? milliseconds : best;
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return Probe::kWork * kIterations * kWarps * blocks / (best * 1e-3);
}

constexpr struct {
  const char* name;
  double (*measure)();
} kRates[] = {
    {"mma.m16n8k16 float16, flop/s", rate<Mma16<Half>>}, {"mma.m16n8k16 bfloat16, flop/s", rate<Mma16<BFloat16>>},
    {"mma.m16n8k8 tf32, flop/s", rate<MmaTf32>},         {"mma.m8n8k4 float64, flop/s", rate<Mma64>},
    {"ldmatrix.x4, byte/s", rate<LoadMatrices>},         {"ex2.approx, operation/s", rate<Exp2>},
};

}  // namespace

extern "C" {

// Null beyond the last one.
const char* rate_name(int i) { return i < static_cast<int>(std::size(kRates)) ? kRates[i].name : nullptr; }

// Work per second, or minus the cudaError_t.
double measure_rate(int i) {
  try {
    return kRates[i].measure();
  } catch (const Failure& failure) {
    return -static_cast<double>(failure.error);
  }
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// On the host: a (count x 16 x depth), b (count x depth x 8), c (count x 16 x 8) += a b. Returns a cudaError_t.
int multiply_many(int bytes, int is_bfloat16, int64_t count, const float* a, const float* b, float* c) {
  try {
    const size_t depth = bytes == 2 ? 16 : 8;
    Buffer<float> on_gpu[] = {Buffer<float>(count * 16 * depth), Buffer<float>(count * depth * 8),
                              Buffer<float>(count * 16 * 8)};
    const float* from[] = {a, b, c};
    for (int i = 0; i < 3; ++i) check(cudaMemcpy(on_gpu[i].data, from[i], on_gpu[i].bytes, cudaMemcpyHostToDevice));
    multiply_each<<<static_cast<unsigned>(count), kWarpSize>>>(bytes, is_bfloat16 != 0, on_gpu[0].data, on_gpu[1].data,
                                                               on_gpu[2].data);
    check(cudaGetLastError());
    check(cudaMemcpy(c, on_gpu[2].data, on_gpu[2].bytes, cudaMemcpyDeviceToHost));
    return cudaSuccess;
  } catch (const Failure& failure) {
    return failure.error;
  }
}

}  // extern "C"

}  // namespace attention_ext
