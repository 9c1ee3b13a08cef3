// exp2 and tanh of a vector, and the arithmetic that core's templates ask for.
#pragma once

#include "cpu/vec/simd.h"

namespace attention_ext {
namespace {

// (2^r - 1) / r on [-1/2, 1/2], near-minimax: 1 + r q(r) is within 5e-9 (float), 8e-18 (double) and, for weights that
// are rounded to bfloat16 anyway, 7e-6.
template <class T>
struct Exp2Fit;
template <>
struct Exp2Fit<float> {
  static constexpr int kCount = 6;
  static constexpr float kCoefficient[] = {0.69314718802622877f,   0.24022650760568126f,   0.055503571142190782f,
                                           0.0096180825572778524f, 0.0013390863364671234f, 0.00015453162945120691f};
  static constexpr float kRound = 0x1.8p23f, kLowest = -160.0f;
};
struct Exp2FitShort {
  static constexpr int kCount = 4;
  static constexpr float kCoefficient[] = {0.69313673388362151f, 0.24022530097412242f, 0.055838282946219855f,
                                           0.0096567102885443557f};
  static constexpr float kRound = 0x1.8p23f, kLowest = -160.0f;
};
template <>
struct Exp2Fit<double> {
  static constexpr int kCount = 11;
  static constexpr double kCoefficient[] = {0.69314718055994529,    0.24022650695910097,    0.055504108664821597,
                                            0.0096181291076068882,  0.0013333558146416936,  0.0001540353044173605,
                                            1.5252733829836119e-05, 1.3215442587921689e-06, 1.0178062445845774e-07,
                                            7.0725859492692234e-09, 4.4549605981865186e-10};
  static constexpr double kRound = 0x1.8p52, kLowest = -1100.0;
};

template <class T>
struct Exponent {
  Vec<T> whole, rest, q;  // x = whole + rest, 2^rest = 1 + rest q
};

template <class T, class Fit>
ATTENTION_INLINE Exponent<T> split_exponent(Vec<T> x) {
  x = max(splat<T>(Fit::kLowest), x);  // -inf would leave NaN as its rest
  const Vec<T> magic = splat<T>(Fit::kRound);
  const Vec<T> whole = (x + magic) - magic;
  const Vec<T> rest = x - whole;
  Vec<T> q = splat<T>(Fit::kCoefficient[Fit::kCount - 1]);
  unroll<Fit::kCount - 1>(UNROLLED(i) { q = fma(q, rest, splat<T>(Fit::kCoefficient[Fit::kCount - 2 - i])); });
  return {whole, rest, q};
}

// 2^x; exactly 0 from the underflow on, NaN stays
template <class T, class Fit = Exp2Fit<T>>
ATTENTION_INLINE Vec<T> exp2(Vec<T> x) {
  const Exponent<T> e = split_exponent<T, Fit>(x);
  return scale_by_power(fma(e.rest, e.q, splat<T>(1)), e.whole);
}

ATTENTION_INLINE float log2_of(float x) { return __builtin_log2f(x); }
ATTENTION_INLINE double log2_of(double x) { return __builtin_log2(x); }

template <class T>
ATTENTION_INLINE Vec<T> abs(Vec<T> x) {
  return max(x, -x);
}

// expm1(2|x|) / (expm1(2|x|) + 2) with x's sign: accurate for small x, where 1 - 2 / (exp(2x) + 1) cancels
template <class T>
ATTENTION_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> limit = splat<T>(sizeof(T) == 4 ? 14 : 28);  // tanh is 1 to the last bit from there on
  const Vec<T> positive = abs<T>(x);
  const Vec<T> clamped = positive > limit ? limit : positive;
  const Exponent<T> e = split_exponent<T, Exp2Fit<T>>(clamped * splat<T>(static_cast<T>(2 * kLog2E)));
  const Vec<T> power = scale_by_power(splat<T>(1), e.whole);
  const Vec<T> expm1 = fma(power * e.rest, e.q, power - splat<T>(1));
  const Vec<T> result = expm1 / (expm1 + splat<T>(2));
  return x < Vec<T>{} ? -result : result;
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
