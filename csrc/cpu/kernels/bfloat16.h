// bfloat16 by AVX-512 BF16: products of pairs, two multiply-adds a lane, summed in float.
#pragma once

#include "cpu/kernels/pack.h"

namespace attention_ext {
namespace {

struct BFloat16Compute {
  using Scalar = float;
  using Element = uint32_t;  // two neighbours in depth, the first in the low half
  using Number = BFloat16;
  static constexpr int kPair = 2;

  ATTENTION_INLINE static F32 operand(const uint32_t* from) { return bit_cast<F32>(load(from)); }
  ATTENTION_INLINE static F32 operand_everywhere(const uint32_t* from) {
    return F32(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*from))));
  }
  ATTENTION_INLINE static F32 exponential(F32 x) { return exp2<float, Exp2FitShort>(x); }
  ATTENTION_INLINE static F32 multiply_add(F32 a, F32 b, F32 c) {
    return F32(_mm512_dpbf16_ps(__m512(c), __m512bh(bit_cast<I32>(a)), __m512bh(bit_cast<I32>(b))));
  }

  // first and second of each lane side by side
  ATTENTION_INLINE static void store_pair(uint32_t* to, F32 first, F32 second) {
    const __m512i side_by_side = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                  22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    store(to, U32(_mm512_permutexvar_epi16(side_by_side, __m512i(rounded(first, second)))));
  }

  // neighbouring lanes side by side: those of first, then those of second, as paired_queries has them
  ATTENTION_INLINE static void store_neighbours(uint32_t* to, F32 first, F32 second) {
    store(to, rounded(first, second));
  }

  static Matrix<const uint32_t> paired_rows(Source from, int64_t rows, int64_t padded_rows, int64_t columns,
                                            uint32_t* buffer, int64_t pair_padding) {
    const auto* data = reinterpret_cast<const uint16_t*>(from.data);
    const bool even =
        columns % (2 * kLanes<uint32_t>) == 0 && reinterpret_cast<uintptr_t>(data) % sizeof(uint32_t) == 0;
    if (is_dense(from, columns) && rows == padded_rows && even && pair_padding == 0) {
      return {reinterpret_cast<const uint32_t*>(data), from.stride_row / 2};
    }
    const int64_t stride = round_up(ceil_div(columns, 2), kLanes<uint32_t>);
    for (int64_t r = 0; r < padded_rows; ++r) {
      auto* to = reinterpret_cast<uint16_t*>(buffer + r * stride);
      const bool seen = r >= pair_padding && r < rows;
      for (int64_t c = seen ? columns : 0; c < 2 * stride; ++c) to[c] = 0;
      if (!seen) continue;
      const uint16_t* row = data + r * from.stride_row;
      if (from.stride_col == 1) {
        __builtin_memcpy(to, row, static_cast<size_t>(columns) * sizeof(uint16_t));
      } else {
        for (int64_t c = 0; c < columns; ++c) to[c] = row[c * from.stride_col];
      }
    }
    return {buffer, stride};
  }

  // (row / 2, column): rows 2i and 2i + 1 side by side
  static Matrix<const uint32_t> interleaved_rows(Matrix<const uint32_t> rows, int64_t padded_rows, int64_t columns,
                                                 uint32_t* buffer) {
    for (int64_t r = 0; r < padded_rows; r += 2) {
      const auto* even = reinterpret_cast<const uint16_t*>(rows.row(r));
      const auto* odd = reinterpret_cast<const uint16_t*>(rows.row(r + 1));
      for (int64_t c = 0; c < columns; c += kLanes<uint32_t>) {
        store(buffer + r / 2 * columns + c, widen(even + c) | (widen(odd + c) << 16));
      }
    }
    return {buffer, columns};
  }

  // (key / 2, q) from weights (key, q): keys 2i and 2i + 1 side by side, 0 beyond the last
  static Matrix<const uint32_t> paired_keys(Matrix<float> weight, int64_t keys, int64_t vectors, uint32_t* buffer) {
    for (int64_t k = 0; k < keys; k += 2) {
      for (int64_t lane = 0; lane < vectors * kLanes<float>; lane += kLanes<float>) {
        const F32 first = load(weight.row(k) + lane), second = k + 1 < keys ? load(weight.row(k + 1) + lane) : F32{};
        store_pair(buffer + k / 2 * weight.stride + lane, first, second);
      }
    }
    return {buffer, weight.stride};
  }

  // (key, q / 2) from weights (key, q)
  static Matrix<const uint32_t> paired_queries(Matrix<float> weight, int64_t keys, int64_t vectors, uint32_t* buffer) {
    const int64_t stride = weight.stride / 2;
    for (int64_t k = 0; k < keys; ++k) {
      for (int64_t v = 0; v < vectors; v += 2) {
        const float* from = weight.row(k) + v * kLanes<float>;
        const F32 second = v + 1 < vectors ? load(from + kLanes<float>) : F32{};
        store_neighbours(buffer + k * stride + v / 2 * kLanes<uint32_t>, load(from), second);
      }
    }
    return {buffer, stride};
  }

 private:
  ATTENTION_INLINE static U32 widen(const uint16_t* from) {
    return __builtin_convertvector(*reinterpret_cast<const HalfWidthWords<kVectorBytes>*>(from), U32);
  }
  // low half: first, high half: second
  ATTENTION_INLINE static U32 rounded(F32 first, F32 second) {
    return bit_cast<U32>(I32(__m512i(_mm512_cvtne2ps_pbh(__m512(second), __m512(first)))));
  }
};

}  // namespace
}  // namespace attention_ext
