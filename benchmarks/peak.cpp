// The peak rates of a core: multiply-adds per second in registers, and bytes per second read from memory. Compiled on
// first use with -march=native, and called from each measured thread.
#include <chrono>
#include <cstddef>
#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
// Enough independent sums to hide the latency of a multiply-add, few enough for 16 registers with two operands.
constexpr int kSums = 12;
constexpr int kRepeats = 5;

#if defined(__aarch64__)
#define KEEP_IN_REGISTER(x) asm volatile("" : "+w"(x))
#elif defined(__AVX512F__)
#define KEEP_IN_REGISTER(x) asm volatile("" : "+v"(x))
#else
#define KEEP_IN_REGISTER(x) asm volatile("" : "+x"(x))
#endif

// The best rate of a few runs of `work`, which returns the amount of its work.
template <class Work>
double best_rate(Work work) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const auto begin = Clock::now();
    const double amount = work();
    const double rate = amount / std::chrono::duration<double>(Clock::now() - begin).count();
    best = rate > best ? rate : best;
  }
  return best;
}

template <class T>
double fma_rate(int64_t iterations) {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  constexpr int kLanes = kVectorBytes / sizeof(T);
  return best_rate([&] {
    Vector sums[kSums] = {};
    const Vector factor = Vector{} + T(0.999), term = Vector{} + T(1e-6);
    for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
      for (int s = 0; s < kSums; ++s) {
        sums[s] = sums[s] * factor + term;
        KEEP_IN_REGISTER(sums[s]);
      }
    }
    return 2.0 * kLanes * kSums * iterations;
  });
}

}  // namespace

extern "C" {

double float32_rate(int64_t iterations) { return fma_rate<float>(iterations); }
double float64_rate(int64_t iterations) { return fma_rate<double>(iterations); }

// Of the dot-product instruction if available, else of float32, in which bfloat16 is then computed.
double bfloat16_rate(int64_t iterations) {
#if defined(__AVX512BF16__)
  constexpr int kPairs = 32;  // multiply-adds of one instruction
  return best_rate([&] {
    __m512 sums[kSums] = {};
    const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
    for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
      for (int s = 0; s < kSums; ++s) {
        sums[s] = _mm512_dpbf16_ps(sums[s], ones, ones);
        KEEP_IN_REGISTER(sums[s]);
      }
    }
    return 2.0 * kPairs * kSums * iterations;
  });
#else
  return fma_rate<float>(iterations);
#endif
}

// Bytes per second; `data` should be far larger than the caches.
double read_rate(const float* data, int64_t bytes) {
  typedef float Vector __attribute__((vector_size(kVectorBytes), aligned(4)));
  constexpr int kLanes = kVectorBytes / sizeof(float);
  return best_rate([&] {
    Vector sums[4] = {};
    const int64_t step = 4 * kLanes;
    const int64_t count = bytes / int64_t{sizeof(float)} / step * step;
    for (int64_t i = 0; i < count; i += step) {
      for (int s = 0; s < 4; ++s) sums[s] += *reinterpret_cast<const Vector*>(data + i + s * kLanes);
    }
    for (Vector& sum : sums) KEEP_IN_REGISTER(sum);
    return double(count) * sizeof(float);
  });
}
}
