// exp2, log2 and tanh of a vector, and the arithmetic that core's templates ask for.
#pragma once

#include <type_traits>

#include "cpu/vec/simd.h"

namespace attention_ext {
namespace {

// (2^r - 1) / r on [0, 1], near-minimax: 1 + r q(r) is within 5e-9 (float), 9e-18 (double) and, for weights that are
// rounded to bfloat16 anyway, 7e-6.
template <class T>
struct Exp2Fit;
template <>
struct Exp2Fit<float> {
  static constexpr int kCount = 6;
  static constexpr float kCoefficient[] = {0.69314717086497657f,   0.24022720418109816f,   0.055496023564022931f,
                                           0.0096521950560147351f, 0.0012692166069140853f, 0.00020817915043540742f};
};
struct Exp2FitShort {
  static constexpr int kCount = 4;
  static constexpr float kCoefficient[] = {0.69313399262015185f, 0.24064704812114832f, 0.053441029270731175f,
                                           0.012763113885719626f};
};
template <>
struct Exp2Fit<double> {
  static constexpr int kCount = 11;
  static constexpr double kCoefficient[] = {0.69314718055994529,    0.24022650695909673,    0.055504108664980671,
                                            0.0096181291051517567,  0.001333355834393728,   0.00015403521219107733,
                                            1.5252998899728418e-05, 1.3210583477765189e-06, 1.0236023803275179e-07,
                                            6.6344458662514139e-09, 6.1230929168263867e-10};
};

template <class T, class Fit>
ATTENTION_INLINE Vec<T> exp2_fit(Vec<T> rest) {
  Vec<T> q = splat<T>(Fit::kCoefficient[Fit::kCount - 1]);
  unroll<Fit::kCount - 1>(UNROLLED(i) { q = fma(q, rest, splat<T>(Fit::kCoefficient[Fit::kCount - 2 - i])); });
  return q;
}

// 2^x = 2^floor(x) (1 + r q(r)); exactly 0 from the underflow on, NaN stays
template <class T, class Fit = Exp2Fit<T>>
ATTENTION_INLINE Vec<T> exp2(Vec<T> x) {
  const Vec<T> rest = above_floor(x);
  return scale_by_power(fma(rest, exp2_fit<T, Fit>(rest), splat<T>(1)), x);
}

// log2(x) of x = 0, normal x > 0, inf or NaN: 2 atanh(s) / ln(2) of the mantissa m in [sqrt(1/2), sqrt(2)), s = (m - 1)
// / (m + 1)
template <class T>
ATTENTION_INLINE Vec<T> log2(Vec<T> x) {
  using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  using Integers = Vec<Integer>;
  constexpr int kMantissa = sizeof(T) == 8 ? 52 : 23;
  constexpr int kTerms = sizeof(T) == 8 ? 10 : 4;  // s^2 < 0.0295, so the next is below the last bit
  const Integers half_root = bit_cast<Integers>(splat<T>(static_cast<T>(0.70710678118654752)));
  const Integers exponent = (bit_cast<Integers>(x) - half_root) >> kMantissa;
  const Vec<T> m = bit_cast<Vec<T>>(bit_cast<Integers>(x) - (exponent << kMantissa));
  const Vec<T> s = (m - splat<T>(1)) / (m + splat<T>(1)), square = s * s;
  Vec<T> series = splat<T>(T(1) / (2 * kTerms + 1));
  unroll<kTerms>(UNROLLED(i) { series = fma(series, square, splat<T>(T(1) / (2 * (kTerms - i) - 1))); });
  const Vec<T> whole = __builtin_convertvector(exponent, Vec<T>);
  const Vec<T> result = fma(s * series, splat<T>(static_cast<T>(2 * kLog2E)), whole);
  const Vec<T> infinity = splat<T>(static_cast<T>(__builtin_inf()));
  return x == Vec<T>{} ? -infinity : (x < infinity ? result : x);
}

template <class T>
ATTENTION_INLINE auto sign_bit(Vec<T> x) {
  using Bits = Vec<std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>>;
  return bit_cast<Bits>(x) & bit_cast<Bits>(splat<T>(static_cast<T>(-0.0)));
}

template <class T>
ATTENTION_INLINE Vec<T> abs(Vec<T> x) {
  return bit_cast<Vec<T>>(bit_cast<decltype(sign_bit<T>(x))>(x) ^ sign_bit<T>(x));
}

// expm1(2|x|) / (expm1(2|x|) + 2) with x's sign: accurate for small x, where 1 - 2 / (exp(2x) + 1) cancels
template <class T>
ATTENTION_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> limit = splat<T>(sizeof(T) == 4 ? 14 : 28);  // tanh is 1 to the last bit from there on
  const Vec<T> positive = abs<T>(x);
  const Vec<T> clamped = positive > limit ? limit : positive;
  const Vec<T> exponent = clamped * splat<T>(static_cast<T>(2 * kLog2E));
  const Vec<T> rest = above_floor(exponent);
  const Vec<T> power = scale_by_power(splat<T>(1), exponent);
  const Vec<T> expm1 = fma(power * rest, exp2_fit<T, Exp2Fit<T>>(rest), power - splat<T>(1));
  const Vec<T> result = expm1 / (expm1 + splat<T>(2));
  return bit_cast<Vec<T>>(bit_cast<decltype(sign_bit<T>(x))>(result) | sign_bit<T>(x));
}

// The arithmetic of core/score_mods.h over a vector of queries.
template <class T>
struct VectorOps {
  using V = Vec<T>;
  using Mask = decltype(V{} < V{});

  ATTENTION_INLINE static V splat(double x) { return attention_ext::splat<T>(static_cast<T>(x)); }
  ATTENTION_INLINE static V abs(V x) { return attention_ext::abs<T>(x); }
  ATTENTION_INLINE static V tanh(V x) { return attention_ext::tanh<T>(x); }
  ATTENTION_INLINE static V select(Mask mask, V a, V b) { return mask ? a : b; }
};

// The arithmetic of core/philox.h.
struct WordOps {
  ATTENTION_INLINE static U32 splat(uint32_t x) { return attention_ext::splat<uint32_t>(x); }
  ATTENTION_INLINE static void multiply_wide(U32 a, uint32_t m, U32& high, U32& low) {
    // Even and odd lanes as 64-bit products; then the halves are sorted back by lane.
    const U64 factor = attention_ext::splat<uint64_t>(m), mask = attention_ext::splat<uint64_t>(0xFFFFFFFFu);
    const U64 lanes = bit_cast<U64>(a);
    const U64 even = multiply_low_words(lanes, factor), odd = multiply_low_words(lanes >> 32, factor);
    high = bit_cast<U32>((even >> 32) | (odd & ~mask));
    low = bit_cast<U32>((even & mask) | (odd << 32));
  }
};

}  // namespace
}  // namespace attention_ext
