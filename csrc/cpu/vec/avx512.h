// AVX-512 F, BW, DQ, VL. 32 registers: tiles of 6 x 4 vectors leave room for the operands.
#pragma once

#include <immintrin.h>

// GCC 12 takes the deliberately undefined operand inside its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "core/numeric.h"

namespace attention_ext {
namespace {

constexpr int kVectorBytes = 64;
constexpr int kTileVectors = 4;

}  // namespace
}  // namespace attention_ext

#include "cpu/vec/simd.h"

namespace attention_ext {
namespace {

ATTENTION_INLINE F32 fma(F32 a, F32 b, F32 c) { return F32(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))); }
ATTENTION_INLINE F64 fma(F64 a, F64 b, F64 c) { return F64(_mm512_fmadd_pd(__m512d(a), __m512d(b), __m512d(c))); }

ATTENTION_INLINE F32 broadcast(const float* x) { return F32(_mm512_set1_ps(*x)); }
ATTENTION_INLINE F64 broadcast(const double* x) { return F64(_mm512_set1_pd(*x)); }

// b where a or b is NaN
ATTENTION_INLINE F32 max(F32 a, F32 b) { return F32(_mm512_max_ps(__m512(a), __m512(b))); }
ATTENTION_INLINE F64 max(F64 a, F64 b) { return F64(_mm512_max_pd(__m512d(a), __m512d(b))); }

// low 32 bits of each lane times low 32 bits, 64-bit products
ATTENTION_INLINE U64 multiply_low_words(U64 a, U64 b) { return U64(_mm512_mul_epu32(__m512i(a), __m512i(b))); }

// x - floor(x); 0 for the infinities
ATTENTION_INLINE F32 above_floor(F32 x) { return F32(_mm512_reduce_ps(__m512(x), _MM_FROUND_TO_NEG_INF)); }
ATTENTION_INLINE F64 above_floor(F64 x) { return F64(_mm512_reduce_pd(__m512d(x), _MM_FROUND_TO_NEG_INF)); }

// x * 2^floor(n); underflows to 0, overflows to inf
ATTENTION_INLINE F32 scale_by_power(F32 x, F32 n) { return F32(_mm512_scalef_ps(__m512(x), __m512(n))); }
ATTENTION_INLINE F64 scale_by_power(F64 x, F64 n) { return F64(_mm512_scalef_pd(__m512d(x), __m512d(n))); }

ATTENTION_INLINE F32 load_half(const uint16_t* from) {
  return F32(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
ATTENTION_INLINE void store_half(uint16_t* to, F32 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace attention_ext
