// Functions of numbers for generated score_mods, written without branches so that compilers vectorise loops of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define SCORE_INLINE [[gnu::always_inline]] inline

namespace attention_ext::score {

template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <class To, class From>
SCORE_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, x);
}

template <class T>
constexpr int kMantissa = sizeof(T) == 8 ? 52 : 23;
template <class T>
constexpr int kBias = sizeof(T) == 8 ? 1023 : 127;

// 2^n for a normal result
template <class T>
SCORE_INLINE T power_of_two(Bits<T> n) {
  return bits<T>(static_cast<Bits<T>>((n + kBias<T>) << kMantissa<T>));
}

// x = n ln(2) + r, |r| <= ln(2) / 2; rest is expm1(r), a Taylor sum to the last bit
template <class T>
struct Reduced {
  Bits<T> n;
  T rest;
};

template <class T>
SCORE_INLINE Reduced<T> reduce(T x) {
  constexpr T kRound = sizeof(T) == 8 ? T(0x1.8p52) : T(0x1.8p23);  // adding it rounds to an integer in the low bits
  constexpr T kHigh = sizeof(T) == 8 ? T(0x1.62e42feep-1) : T(0x1.62e4p-1);
  constexpr T kLow = sizeof(T) == 8 ? T(0x1.a39ef35793c76p-33) : T(0x1.7f7d1cp-20);
  constexpr int kTerms = sizeof(T) == 8 ? 14 : 8;
  const T shifted = x * T(1.4426950408889634) + kRound;
  const T n = shifted - kRound;
  const T r = (x - n * kHigh) - n * kLow;
  T sum = T(1);
  for (int i = kTerms; i >= 2; --i) sum = T(1) + sum * r * (T(1) / T(i));
  return {static_cast<Bits<T>>(bits<Bits<T>>(shifted) - bits<Bits<T>>(kRound)), sum * r};
}

template <class T>
SCORE_INLINE T clamped(T x, T least, T most) {
  x = x < least ? least : x;
  return x > most ? most : x;  // NaN stays
}

template <class T>
SCORE_INLINE T exp(T x) {
  constexpr T kMost = sizeof(T) == 8 ? T(800) : T(120);
  const Reduced<T> r = reduce(clamped(x, -kMost, kMost));
  const Bits<T> half = r.n >> 1;
  return (T(1) + r.rest) * power_of_two<T>(half) * power_of_two<T>(r.n - half);
}

template <class T>
SCORE_INLINE T expm1(T x) {
  constexpr T kMost = sizeof(T) == 8 ? T(800) : T(120);
  const Reduced<T> r = reduce(clamped(x, -kMost, kMost));
  const Bits<T> half = r.n >> 1;
  const T first = power_of_two<T>(half), second = power_of_two<T>(r.n - half);
  return first * (second * r.rest + (second - power_of_two<T>(-half)));
}

template <class T>
SCORE_INLINE T tanh(T x) {
  const T positive = clamped(std::fabs(x), T(0), T(sizeof(T) == 8 ? 40 : 20));  // where tanh is 1
  const Reduced<T> r = reduce(positive + positive);
  const T power = power_of_two<T>(r.n);
  const T grown = power * r.rest + (power - T(1));  // expm1(2 |x|)
  return std::copysign(grown / (grown + T(2)), x);
}

// log(m 2^e) with m in [sqrt(1/2), sqrt(2)): e ln(2) + 2 atanh((m - 1) / (m + 1))
template <class T>
SCORE_INLINE T log(T x) {
  constexpr int kTerms = sizeof(T) == 8 ? 11 : 5;
  const bool tiny = x < std::numeric_limits<T>::min();
  const T scaled = tiny ? x * power_of_two<T>(kMantissa<T> + 2) : x;
  const Bits<T> half_root = bits<Bits<T>>(T(0.70710678118654752));
  using Unsigned = std::make_unsigned_t<Bits<T>>;
  const Unsigned above = static_cast<Unsigned>(bits<Bits<T>>(scaled)) - static_cast<Unsigned>(half_root) +
                         (static_cast<Unsigned>(kBias<T>) << kMantissa<T>);  // positive, so that shifts need no sign
  const Bits<T> e = static_cast<Bits<T>>(above >> kMantissa<T>) - kBias<T>;
  const T m = bits<T>(static_cast<Bits<T>>(bits<Bits<T>>(scaled) - (e << kMantissa<T>)));
  const T s = (m - T(1)) / (m + T(1)), square = s * s;
  T series = T(1) / T(2 * kTerms + 1);
  for (int i = kTerms - 1; i >= 0; --i) series = series * square + T(1) / T(2 * i + 1);
  const T whole = static_cast<T>(e) - (tiny ? T(kMantissa<T> + 2) : T(0));
  const T result = whole * T(0.69314718055994531) + T(2) * s * series;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const T special = x == T(0) ? -kInfinity : (x > T(0) ? x : std::numeric_limits<T>::quiet_NaN());
  return x > T(0) && x < kInfinity ? result : special;
}

template <class T>
SCORE_INLINE T log1p(T x) {
  const T sum = T(1) + x, lost = x - (sum - T(1));
  const T result = log(sum) + lost / sum;
  return sum > T(0) && sum < std::numeric_limits<T>::infinity() ? result : log(sum);
}

template <class T>
SCORE_INLINE T sigmoid(T x) {
  return T(1) / (T(1) + exp(-x));
}

// Whole numbers divide by 1 instead of 0, and say so. The least one by -1 is itself.
template <class T>
SCORE_INLINE T divide_whole(T a, T b, int& wrong) {
  wrong |= b == 0;
  const bool negates = std::is_signed_v<T> && b == T(-1);
  const T quotient = a / (b == 0 || negates ? T(1) : b);
  return negates ? -quotient : quotient;
}

// Division as torch's operators round it.
template <class T>
SCORE_INLINE T divide_down(T a, T b, int& wrong) {
  if constexpr (std::is_floating_point_v<T>) {  // not floor(a / b): 1 / 0.1 rounds up to 10
    const T rest = std::fmod(a, b);
    const T whole = std::nearbyint((a - rest) / b) - (rest != 0 && (rest < 0) != (b < 0) ? T(1) : T(0));
    return b == 0 ? a / b : std::copysign(whole, whole == 0 ? a / b : whole);
  } else {
    const T quotient = divide_whole(a, b, wrong);
    return quotient * b != a && b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
  }
}

template <class T>
SCORE_INLINE T divide_to_zero(T a, T b, int& wrong) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::trunc(a / b);
  } else {
    return divide_whole(a, b, wrong);
  }
}

template <class T>
SCORE_INLINE T remainder(T a, T b, int& wrong) {  // with the sign of b
  if constexpr (std::is_floating_point_v<T>) {
    const T rest = std::fmod(a, b);
    return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
  } else {
    return a - divide_down(a, b, wrong) * b;
  }
}

template <class T>
SCORE_INLINE T fmod(T a, T b, int& wrong) {  // with the sign of a
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmod(a, b);
  } else {
    return a - divide_to_zero(a, b, wrong) * b;
  }
}

template <class T>
SCORE_INLINE T power(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::pow(a, b);
  } else {
    if (b < 0) return a == 1 ? T(1) : (a == T(-1) ? (b % 2 != 0 ? T(-1) : T(1)) : T(0));
    T result = 1;
    for (; b > 0; b /= 2, a *= a) result *= b % 2 != 0 ? a : T(1);
    return result;
  }
}

template <class T>
SCORE_INLINE T shift_left(T a, T b) {  // 0 where C++ has no answer
  const bool outside = b < 0 || b >= T(8 * sizeof(T));
  return outside ? T(0) : a << (outside ? T(0) : b);
}

template <class T>
SCORE_INLINE T shift_right(T a, T b) {
  const bool outside = b < 0 || b >= T(8 * sizeof(T));
  return outside ? (a < 0 ? T(-1) : T(0)) : a >> (outside ? T(0) : b);
}

template <class T>
SCORE_INLINE T maximum(T a, T b) {  // NaN if either is
  return a > b || a != a ? a : b;
}
template <class T>
SCORE_INLINE T minimum(T a, T b) {
  return a < b || a != a ? a : b;
}

// An index of a dimension, counted from its end where negative.
SCORE_INLINE int64_t place(int64_t index, int64_t size, int& wrong) {
  index = index < 0 ? index + size : index;
  const bool outside = index < 0 || index >= size;
  wrong |= outside;
  return outside ? 0 : index;
}

}  // namespace attention_ext::score
