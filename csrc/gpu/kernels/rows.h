// Which rows a block of threads owns, where they lie, and how results get there.
#pragma once

#include "gpu/kernels/positions.h"

namespace attention_ext {
namespace {

// Which tile of queries a block of threads owns; the last ones, the longest of a causal call, come first.
struct QueryTileIndex {
  int64_t batch, head, tile;

  ATTENTION_DEVICE QueryTileIndex(const AttentionProblem& p, int queries, int64_t index = block_index()) {
    const int64_t tiles = ceil_div(p.max_seqlen_q, queries);
    head = index % p.heads;
    batch = index / p.heads % p.batch;
    tile = tiles - 1 - index / p.heads / p.batch;
  }
  ATTENTION_INLINE static int64_t count(const AttentionProblem& p, int queries) {
    return p.batch * p.heads * ceil_div(p.max_seqlen_q, queries);
  }
  ATTENTION_DEVICE Range queries(const Sequence& s, int queries) const {
    return {tile * queries, minimum((tile + 1) * queries, s.length_q)};
  }
};

template <class E>
ATTENTION_DEVICE Rows<E> head_rows(const Head& head, const View& view, int64_t columns) {
  const Sequence& s = head.sequence;
  return rows_of<E>(view, s.tensor_batch, head.head, s.begin_q, columns);
}

template <class E>
ATTENTION_DEVICE Rows<E> key_rows(const Head& head, const View& view, int64_t columns) {
  const Sequence& s = head.sequence;
  return rows_of<E>(view, s.tensor_batch, head.kv_head, s.begin_k, columns);
}

// Writes 16 rows of fragments, each times factor[row], rounded to the dtype of `to`.
template <class E, class T, int kTiles>
ATTENTION_DEVICE void store_rows(const Rows<E>& to, int64_t first, int64_t end, const Fragment<T> (&from)[kTiles],
                                 const T (&factor)[2]) {
  ATTENTION_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int64_t row = first + r * 8 + lane_group();
    if (row >= end) continue;
    ATTENTION_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      const int column = n * kFragmentColumns + 2 * lane_member();
      E pair[2];
      round_pair(pair, from[n].number[2 * r] * factor[r], from[n].number[2 * r + 1] * factor[r]);
      if (column < to.columns) to.row(row)[column * to.stride_col] = pair[0];
      if (column + 1 < to.columns) to.row(row)[(column + 1) * to.stride_col] = pair[1];
    }
  }
}

}  // namespace
}  // namespace attention_ext
