// 128-bit vectors by the vector extensions, and an intrinsic where those have no word: x86-64 baseline (SSE2) and
// AArch64 (NEON).
#pragma once

#include "core/numeric.h"

namespace attention_ext {
namespace {

constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
constexpr int kTileVectors = 4;  // 32 registers
#else
constexpr int kTileVectors = 2;  // 16 registers
#endif

}  // namespace
}  // namespace attention_ext

#include "cpu/vec/simd.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <emmintrin.h>
#endif

namespace attention_ext {
namespace {

#if defined(__aarch64__)
ATTENTION_INLINE F32 fma(F32 a, F32 b, F32 c) { return F32(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b))); }
ATTENTION_INLINE F64 fma(F64 a, F64 b, F64 c) { return F64(vfmaq_f64(float64x2_t(c), float64x2_t(a), float64x2_t(b))); }
ATTENTION_INLINE U64 multiply_low_words(U64 a, U64 b) {
  return U64(vmull_u32(vmovn_u64(uint64x2_t(a)), vmovn_u64(uint64x2_t(b))));
}
#else
ATTENTION_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
ATTENTION_INLINE F64 fma(F64 a, F64 b, F64 c) { return a * b + c; }
ATTENTION_INLINE U64 multiply_low_words(U64 a, U64 b) { return U64(_mm_mul_epu32(__m128i(a), __m128i(b))); }
#endif

ATTENTION_INLINE F32 broadcast(const float* x) { return splat<float>(*x); }
ATTENTION_INLINE F64 broadcast(const double* x) { return splat<double>(*x); }

// b where a or b is NaN
ATTENTION_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }
ATTENTION_INLINE F64 max(F64 a, F64 b) { return a > b ? a : b; }
ATTENTION_INLINE F32 min(F32 a, F32 b) { return a < b ? a : b; }
ATTENTION_INLINE F64 min(F64 a, F64 b) { return a < b ? a : b; }

// For |x| below 2^22 and 2^51: the exponents of powers.
ATTENTION_INLINE F32 floor(F32 x) {
  const F32 nearest = (x + 0x1.8p23f) - 0x1.8p23f;
  return nearest > x ? nearest - 1.0f : nearest;
}
ATTENTION_INLINE F64 floor(F64 x) {
  const F64 nearest = (x + 0x1.8p52) - 0x1.8p52;
  return nearest > x ? nearest - 1.0 : nearest;
}

// IEEE half precision by integer arithmetic: exact to float, round to nearest even from float. No float on the way is
// subnormal, which a caller may have told the CPU to take for 0.
ATTENTION_INLINE F32 load_half(const uint16_t* from) {
  U32 bits{};
  for (int i = 0; i < kLanes<float>; ++i) bits[i] = from[i];
  const U32 sign = (bits & 0x8000u) << 16, half = bits & 0x7FFFu;
  const U32 normal = (half << 13) + 0x38000000u;  // exponent and mantissa in float's places, bias 127 instead of 15
  const F32 subnormal = __builtin_convertvector(bit_cast<I32>(half), F32) * 0x1p-24f;
  U32 magnitude = half < 0x0400u ? bit_cast<U32>(subnormal) : normal;
  magnitude = half >= 0x7C00u ? (half << 13) | 0x7F800000u : magnitude;
  return bit_cast<F32>(magnitude | sign);
}

ATTENTION_INLINE void store_half(uint16_t* to, F32 v) {
  const U32 all = bit_cast<U32>(v);
  const U32 sign = (all >> 16) & 0x8000u;
  const U32 magnitude = all & 0x7FFFFFFFu;
  const U32 normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns the mantissa to half's subnormal step and rounds it there.
  const U32 subnormal = bit_cast<U32>(bit_cast<F32>(magnitude) + 0.5f) - 0x3F000000u;
  U32 half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? splat<uint32_t>(0x7C00u) : half;  // from 2^16 on: inf
  half = magnitude > 0x7F800000u ? splat<uint32_t>(0x7E00u) : half;   // NaN
  half |= sign;
  for (int i = 0; i < kLanes<float>; ++i) to[i] = static_cast<uint16_t>(half[i]);
}

}  // namespace
}  // namespace attention_ext

#include "cpu/vec/scale_by_bits.h"
