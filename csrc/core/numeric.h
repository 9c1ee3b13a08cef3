// Small things every layer counts with. All of core is always inlined: a unit built for a wide instruction set must not
// leave copies of shared functions that the linker could hand to a narrower CPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ATTENTION_INLINE __host__ __device__ __forceinline__
#else
#define ATTENTION_INLINE [[gnu::always_inline]] inline
#endif

namespace attention_ext {

constexpr double kLog2E = 1.4426950408889634;  // softmax runs in base 2: exp(x) = exp2(x * log2(e))
constexpr double kLn2 = 0.6931471805599453;

template <class T>
ATTENTION_INLINE constexpr T minimum(T a, T b) {
  return a < b ? a : b;
}

template <class T>
ATTENTION_INLINE constexpr T maximum(T a, T b) {
  return a > b ? a : b;
}

// x >= limit for a positive limit, by the bits of both: no double-precision instruction, which GPUs are slow at.
ATTENTION_INLINE bool at_least(double x, double limit) {
  return __builtin_bit_cast(int64_t, x) >= __builtin_bit_cast(int64_t, limit);
}
ATTENTION_INLINE bool is_positive(double x) { return __builtin_bit_cast(int64_t, x) > 0; }

ATTENTION_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

ATTENTION_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

ATTENTION_INLINE constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return minimum(maximum(x, low), high);
}

struct Range {
  int64_t begin = 0, end = 0;
  ATTENTION_INLINE int64_t size() const { return end - begin; }
  ATTENTION_INLINE bool empty() const { return end <= begin; }
};

}  // namespace attention_ext
