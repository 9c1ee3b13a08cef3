// The warp layer on a GPU: CUDA's built-ins and the only PTX there is.
#pragma once

#include "core/problem.h"
#include "gpu/plan.h"
#include "gpu/warp/numbers.h"

#define ATTENTION_DEVICE __device__ __forceinline__
#define ATTENTION_UNROLL _Pragma("unroll")
#define ATTENTION_PRAGMA(text) _Pragma(#text)
#define ATTENTION_UNROLL_BY(count) ATTENTION_PRAGMA(unroll(count))

namespace attention_ext {
namespace {

// Threads

ATTENTION_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
// The same, read anew, so that what is made of it holds no registers throughout a loop.
ATTENTION_DEVICE int reread_thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
ATTENTION_DEVICE int64_t block_index() { return blockIdx.x; }
// x in a register from here on, not made anew wherever it is used.
ATTENTION_DEVICE int in_register(int x) {
  asm("" : "+r"(x));
  return x;
}
ATTENTION_DEVICE void synchronize_block() { __syncthreads(); }
ATTENTION_DEVICE bool any_in_warp(bool flag) { return __any_sync(~0u, flag) != 0; }

template <class T>
ATTENTION_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}

// Shared memory, 128-byte aligned

ATTENTION_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// Of single numbers.
template <class T>
ATTENTION_DEVICE T load_shared(const T* from) {
  return *from;
}
template <class T>
ATTENTION_DEVICE void store_shared(T* to, T value) {
  *to = value;
}

using SharedAddress = uint32_t;  // in bytes

ATTENTION_DEVICE SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

template <class T>
ATTENTION_DEVICE const T* shared_pointer(SharedAddress address) {
  return static_cast<const T*>(__cvta_shared_to_generic(address));
}

// `bytes` of 16 from global memory, zeros for the rest; there once wait_copies says so.
ATTENTION_DEVICE void copy_async(SharedAddress to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
ATTENTION_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Waits for this thread's copies but for the last kPending groups.
template <int kPending>
ATTENTION_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lane 8 i + j names row j of matrix i.
ATTENTION_DEVICE void load_matrices(uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}
ATTENTION_DEVICE void load_matrices_transposed(uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}

// Matrix products, fragments as PTX lays them out

ATTENTION_DEVICE void multiply_16x8x16(Half, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
ATTENTION_DEVICE void multiply_16x8x16(BFloat16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
ATTENTION_DEVICE void multiply_16x8x8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
ATTENTION_DEVICE void multiply_8x8x4(double& c0, double& c1, double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c0), "+d"(c1)
      : "d"(a), "d"(b));
}
// By one instruction from sm_90 on, before that by four.
ATTENTION_DEVICE void multiply_16x8x8(double (&c)[4], const double (&a)[4], const double (&b)[2]) {
#if __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
  for (int k = 0; k < 2; ++k) {
    multiply_8x8x4(c[0], c[1], a[2 * k], b[k]);
    multiply_8x8x4(c[2], c[3], a[2 * k + 1], b[k]);
  }
#endif
}

// Numbers

ATTENTION_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
ATTENTION_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
ATTENTION_DEVICE float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
ATTENTION_DEVICE float widen(Half x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

// Two neighbours, rounded; the first in the low half.
ATTENTION_DEVICE uint32_t narrow_pair(Half, float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
ATTENTION_DEVICE uint32_t narrow_pair(BFloat16, float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

ATTENTION_DEVICE uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

ATTENTION_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// The larger; of a number and a NaN the number.
ATTENTION_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
ATTENTION_DEVICE double larger(double a, double b) { return fmax(a, b); }
ATTENTION_DEVICE float exp2_of(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
ATTENTION_DEVICE double exp2_of(double x) { return exp2(x); }
ATTENTION_DEVICE float log2_of(float x) { return log2f(x); }
ATTENTION_DEVICE double log2_of(double x) { return log2(x); }
ATTENTION_DEVICE float tanh_of(float x) { return tanhf(x); }
ATTENTION_DEVICE double tanh_of(double x) { return tanh(x); }
ATTENTION_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
ATTENTION_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Launches

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    run_kernel(const __grid_constant__ typename Kernel::Problem problem, void* workspace) {
  Kernel::run(problem, workspace);
}

template <class Kernel>
int enqueue(const Launch& launch, const AttentionProblem& problem, void* workspace, void* stream) {
  if (launch.blocks == 0) return cudaSuccess;
  const auto bytes = static_cast<int>(launch.shared_bytes);
  const cudaError_t allowed =
      cudaFuncSetAttribute(run_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (allowed != cudaSuccess) return allowed;
  run_kernel<Kernel>
      <<<static_cast<unsigned>(launch.blocks), launch.threads, launch.shared_bytes,
         static_cast<cudaStream_t>(stream)>>>(static_cast<const typename Kernel::Problem&>(problem), workspace);
  return cudaGetLastError();
}

}  // namespace

using KernelPlan = GpuPlan;

template <class Kernel>
void add_launch(KernelPlan& plan, int64_t blocks) {
  static_assert(Kernel::kSharedBytes <= kMostSharedBytes);
  plan.launches[plan.launch_count++] = {blocks, Kernel::kThreads, Kernel::kSharedBytes, enqueue<Kernel>};
}

inline void add_launches(KernelPlan& plan, const KernelPlan& more) {
  for (int i = 0; i < more.launch_count; ++i) plan.launches[plan.launch_count++] = more.launches[i];
}

inline void set_workspace(KernelPlan& plan, size_t bytes) { plan.workspace_bytes = bytes; }

}  // namespace attention_ext
