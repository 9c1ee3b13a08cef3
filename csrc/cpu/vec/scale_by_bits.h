// Powers of two without instructions for them: 2^n is made of its exponent's bits. Included by an instruction set's
// file after it has defined max, min and floor.
#pragma once

#include "cpu/vec/simd.h"

namespace attention_ext {
namespace {

template <class T>
struct FloatLayout;
template <>
struct FloatLayout<float> {
  using Integer = int32_t;
  static constexpr int kMantissa = 23;
  static constexpr float kBias = 127.0f, kRound = 0x1.8p23f;
};
template <>
struct FloatLayout<double> {
  using Integer = int64_t;
  static constexpr int kMantissa = 52;
  static constexpr double kBias = 1023.0, kRound = 0x1.8p52;
};

// Between the exponents that stand for 0 and for inf; NaN stays.
template <class T>
ATTENTION_INLINE Vec<T> within_exponents(Vec<T> x) {
  return min(splat<T>(FloatLayout<T>::kBias + 1), max(splat<T>(-FloatLayout<T>::kBias), x));
}

template <class T>
ATTENTION_INLINE Vec<T> above_floor_of(Vec<T> x) {
  const Vec<T> within = within_exponents<T>(x);
  return within - floor(within);
}

template <class T>
ATTENTION_INLINE Vec<T> scale_by_power_of(Vec<T> x, Vec<T> n) {
  using Layout = FloatLayout<T>;
  using Integers = Vec<typename Layout::Integer>;
  const Vec<T> biased = floor(within_exponents<T>(n)) + splat<T>(Layout::kRound + Layout::kBias);
  return x * bit_cast<Vec<T>>(bit_cast<Integers>(biased) << Layout::kMantissa);
}

// x - floor(x)
ATTENTION_INLINE F32 above_floor(F32 x) { return above_floor_of<float>(x); }
ATTENTION_INLINE F64 above_floor(F64 x) { return above_floor_of<double>(x); }

// x * 2^floor(n); below the least normal power 0, overflows to inf
ATTENTION_INLINE F32 scale_by_power(F32 x, F32 n) { return scale_by_power_of<float>(x, n); }
ATTENTION_INLINE F64 scale_by_power(F64 x, F64 n) { return scale_by_power_of<double>(x, n); }

}  // namespace
}  // namespace attention_ext
