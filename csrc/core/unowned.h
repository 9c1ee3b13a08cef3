// Rows of packed tensors after the last sequence, as totals padded to a fixed size have them. No kernel reads them; a
// pass returns 0 there, and -inf for logsumexp.
#pragma once

#include "core/varlen.h"

namespace attention_ext {

ATTENTION_INLINE Range unowned_rows(const int64_t* cu_seqlens, int64_t batch, int64_t total) {
  return {clamp(cu_seqlens[batch], 0, total), total};
}

// One of several workers: every `rows`-th row from `row` on, and of these every `columns`-th number from `column` on.
struct ClearingShare {
  int64_t row = 0, rows = 1, column = 0, columns = 1;
};

// Rows of (head, row, column), in every head.
struct UnownedRows {
  Range rows;
  ClearingShare share;

  ATTENTION_INLINE void fill(const View& to, int64_t heads, int64_t columns, double value = 0) const {
    if (!to) return;
    if (to.dtype == DType::kFloat64) return fill(static_cast<double*>(to.data), to, heads, columns, value);
    if (to.dtype == DType::kFloat32) {
      return fill(static_cast<float*>(to.data), to, heads, columns, static_cast<float>(value));
    }
    fill(static_cast<uint16_t*>(to.data), to, heads, columns, uint16_t{0});  // of 16-bit outputs only zeros are asked
  }

  // (head, row), contiguous
  ATTENTION_INLINE void fill_numbers(const AttentionProblem& p, void* to, double value = 0) const {
    const DType dtype = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    fill({to, dtype, 0, p.seqlen_q, 1, 1}, p.heads, 1, value);
  }

 private:
  template <class E>
  ATTENTION_INLINE void fill(E* data, const View& to, int64_t heads, int64_t columns, E value) const {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t row = rows.begin + share.row; row < rows.end; row += share.rows) {
        E* const first = data + h * to.stride_h + row * to.stride_row;
        for (int64_t c = share.column; c < columns; c += share.columns) first[c * to.stride_col] = value;
      }
    }
  }
};

// Overloads for the outputs of each pass.
ATTENTION_INLINE void clear_unowned(const ForwardProblem& p, const UnownedRows& queries, const UnownedRows& /*keys*/) {
  queries.fill(p.out, p.heads, p.head_dim_v);
  queries.fill_numbers(p, p.logsumexp, -__builtin_inf());
}

ATTENTION_INLINE void clear_unowned(const BackwardProblem& p, const UnownedRows& queries, const UnownedRows& keys) {
  queries.fill(p.grad_query, p.heads, p.head_dim);
  keys.fill(p.grad_key, p.kv_heads, p.head_dim);
  keys.fill(p.grad_value, p.kv_heads, p.head_dim_v);
}

ATTENTION_INLINE void clear_unowned(const JvpProblem& p, const UnownedRows& queries, const UnownedRows& keys) {
  queries.fill(p.out_tangent, p.heads, p.head_dim_v);
  queries.fill_numbers(p, p.logsumexp_tangent);
  clear_unowned(static_cast<const BackwardProblem&>(p), queries, keys);
}

}  // namespace attention_ext
