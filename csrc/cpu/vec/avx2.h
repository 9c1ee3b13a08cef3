// AVX2 with FMA and F16C. 16 registers: tiles of 6 x 2 vectors.
#pragma once

#include <immintrin.h>

#include "core/numeric.h"

namespace attention_ext {
namespace {

constexpr int kVectorBytes = 32;
constexpr int kTileVectors = 2;

}  // namespace
}  // namespace attention_ext

#include "cpu/vec/simd.h"

namespace attention_ext {
namespace {

ATTENTION_INLINE F32 fma(F32 a, F32 b, F32 c) { return F32(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c))); }
ATTENTION_INLINE F64 fma(F64 a, F64 b, F64 c) { return F64(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(c))); }

ATTENTION_INLINE F32 broadcast(const float* x) { return F32(_mm256_set1_ps(*x)); }
ATTENTION_INLINE F64 broadcast(const double* x) { return F64(_mm256_set1_pd(*x)); }

// b where a or b is NaN
ATTENTION_INLINE F32 max(F32 a, F32 b) { return F32(_mm256_max_ps(__m256(a), __m256(b))); }
ATTENTION_INLINE F64 max(F64 a, F64 b) { return F64(_mm256_max_pd(__m256d(a), __m256d(b))); }
ATTENTION_INLINE F32 min(F32 a, F32 b) { return F32(_mm256_min_ps(__m256(a), __m256(b))); }
ATTENTION_INLINE F64 min(F64 a, F64 b) { return F64(_mm256_min_pd(__m256d(a), __m256d(b))); }

ATTENTION_INLINE F32 floor(F32 x) { return F32(_mm256_floor_ps(__m256(x))); }
ATTENTION_INLINE F64 floor(F64 x) { return F64(_mm256_floor_pd(__m256d(x))); }

// low 32 bits of each lane times low 32 bits, 64-bit products
ATTENTION_INLINE U64 multiply_low_words(U64 a, U64 b) { return U64(_mm256_mul_epu32(__m256i(a), __m256i(b))); }

ATTENTION_INLINE F32 load_half(const uint16_t* from) {
  return F32(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
ATTENTION_INLINE void store_half(uint16_t* to, F32 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace attention_ext

#include "cpu/vec/scale_by_bits.h"
