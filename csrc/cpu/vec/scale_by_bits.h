// Powers of two without instructions for them: n is added to the exponent.
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
  static constexpr float kRound = 0x1.8p23f, kLowest = -160.0f, kHighest = 160.0f, kLeast = -126.0f, kMost = 127.0f;
};
template <>
struct FloatLayout<double> {
  using Integer = int64_t;
  static constexpr int kMantissa = 52;
  static constexpr double kRound = 0x1.8p52, kLowest = -1100.0, kHighest = 1100.0, kLeast = -1022.0, kMost = 1023.0;
};

// Past the exponents there are, nearer numbers serve as well; NaN stays.
template <class T>
ATTENTION_INLINE Vec<T> within_exponents(Vec<T> x) {
  x = x < FloatLayout<T>::kLowest ? splat<T>(FloatLayout<T>::kLowest) : x;
  return x > FloatLayout<T>::kHighest ? splat<T>(FloatLayout<T>::kHighest) : x;
}

template <class T>
ATTENTION_INLINE Vec<T> floor_within(Vec<T> x) {
  const Vec<T> magic = splat<T>(FloatLayout<T>::kRound);
  const Vec<T> nearest = (x + magic) - magic;
  return nearest > x ? nearest - splat<T>(1) : nearest;
}

template <class T>
ATTENTION_INLINE Vec<T> above_floor_of(Vec<T> x) {
  const Vec<T> within = within_exponents<T>(x);
  return within - floor_within<T>(within);
}

// x in [1, 2]
template <class T>
ATTENTION_INLINE Vec<T> scale_by_power_of(Vec<T> x, Vec<T> n) {
  using Layout = FloatLayout<T>;
  using Integers = Vec<typename Layout::Integer>;
  const Vec<T> whole = floor_within<T>(within_exponents<T>(n));
  const Integers exponent = bit_cast<Integers>(whole + splat<T>(Layout::kRound)) << Layout::kMantissa;
  Vec<T> scaled = bit_cast<Vec<T>>(bit_cast<Integers>(x) + exponent);
  scaled = whole < Layout::kLeast ? Vec<T>{} : scaled;
  scaled = whole > Layout::kMost - 1 ? splat<T>(static_cast<T>(__builtin_inf())) : scaled;
  return n == n ? scaled : n;
}

// x - floor(x)
ATTENTION_INLINE F32 above_floor(F32 x) { return above_floor_of<float>(x); }
ATTENTION_INLINE F64 above_floor(F64 x) { return above_floor_of<double>(x); }

// x * 2^floor(n); underflows to 0, overflows to inf
ATTENTION_INLINE F32 scale_by_power(F32 x, F32 n) { return scale_by_power_of<float>(x, n); }
ATTENTION_INLINE F64 scale_by_power(F64 x, F64 n) { return scale_by_power_of<double>(x, n); }

}  // namespace
}  // namespace attention_ext
