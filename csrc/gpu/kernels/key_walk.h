// The walk of a block of threads over the rows of some tensors, tile by tile through shared memory, the next tiles on
// their way while these are worked on.
#pragma once

#include "gpu/kernels/positions.h"

namespace attention_ext {
namespace {

// Which tile of queries a block of threads owns; the last ones, the longest of a causal call, come first.
struct QueryTileIndex {
  int64_t batch, head, tile;

  ATTENTION_DEVICE QueryTileIndex(const AttentionProblem& p, int queries) {
    const int64_t tiles = ceil_div(p.max_seqlen_q, queries), index = block_index();
    head = index % p.heads;
    batch = index / p.heads % p.batch;
    tile = tiles - 1 - index / p.heads / p.batch;
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

// Calls f(first row, tile_of) for every tile of rows that holds some of `valid`, tile_of(i) being those of source i.
// Tiles begin at multiples of their height; rows outside `valid` are 0.
template <int kThreads, int kStages, class Tile, int kSources, class E, class F>
ATTENTION_DEVICE void walk_rows(SharedArena arena, const Rows<E> (&sources)[kSources], Range valid, F&& f) {
  const Span span(valid);
  const auto tile_of = [&](int stage, int i) {
    return Tile{reinterpret_cast<E*>(arena.next + (stage * kSources + i) * Tile::kBytes)};
  };
  const auto copy = [&](int row, int stage) {
    if (row < span.end) {
      ATTENTION_UNROLL
      for (int i = 0; i < kSources; ++i) copy_rows<kThreads>(tile_of(stage, i), sources[i], row, span);
    }
    commit_copies();
  };
  const int first = span.begin / Tile::kRows * Tile::kRows;
  for (int s = 0; s < kStages - 1; ++s) copy(first + s * Tile::kRows, s);
  int stage = 0;
  for (int row = first; row < span.end; row += Tile::kRows) {
    copy(row + (kStages - 1) * Tile::kRows, (stage + kStages - 1) % kStages);
    wait_copies<kStages - 1>();
    synchronize_block();
    f(row, [&](int i) { return tile_of(stage, i); });
    synchronize_block();
    stage = (stage + 1) % kStages;
  }
  wait_copies<0>();
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
