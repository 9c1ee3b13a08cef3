// Which rows a block of threads owns, where they lie, and how results get there.
#pragma once

#include "gpu/kernels/positions.h"
#include "gpu/kernels/sequence_tiles.h"

namespace attention_ext {
namespace {

// Which tile of queries a block of threads owns; the last ones, the longest of a causal call, come first.
struct QueryTileIndex {
  int64_t batch, head, tile;

  ATTENTION_DEVICE QueryTileIndex(const AttentionProblem& p, int queries, int64_t index = block_index()) {
    const SequenceTiles tiles = SequenceTiles::of_queries(p, queries);
    const SequenceTile own = tiles.at(tiles.count() - 1 - index / p.heads);
    batch = own.batch;
    head = index % p.heads;
    tile = own.index;
  }
  ATTENTION_INLINE static int64_t count(const AttentionProblem& p, int queries) {
    return SequenceTiles::of_queries(p, queries).count() * p.heads;
  }
  // The block that owns a tile.
  ATTENTION_DEVICE static int64_t index_of(const AttentionProblem& p, int queries, const Head& head, int64_t tile) {
    const SequenceTiles tiles = SequenceTiles::of_queries(p, queries);
    return (tiles.count() - 1 - tiles.place({head.sequence.batch, tile})) * p.heads + head.head;
  }
  ATTENTION_DEVICE Range queries(const Sequence& s, int queries) const {
    return {tile * queries, minimum((tile + 1) * queries, s.length_q)};
  }
};

// Likewise a tile of keys of one key head; here the first ones are the longest of a causal call.
struct KeyTileIndex {
  int64_t batch, kv_head, tile;

  ATTENTION_DEVICE KeyTileIndex(const AttentionProblem& p, int keys) {
    const SequenceTile own = SequenceTiles::of_keys(p, keys).at(block_index() / p.kv_heads);
    batch = own.batch;
    kv_head = block_index() % p.kv_heads;
    tile = own.index;
  }
  ATTENTION_INLINE static int64_t count(const AttentionProblem& p, int keys) {
    return SequenceTiles::of_keys(p, keys).count() * p.kv_heads;
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

// Calls f(n, i, element) for a lane's elements of a row: number i % 2 of either half of fragment n is column
// 8 n + 2 member + i, if there is one.
template <int kTiles, class E, class F>
ATTENTION_DEVICE void for_each_column(const Rows<E>& rows, int64_t row, F&& f) {
  int column = 2 * lane_member();
  E* element = rows.row(row) + column * rows.stride_col;
  ATTENTION_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    if (column < rows.columns) f(n, 0, *element);
    if (column + 1 < rows.columns) f(n, 1, element[rows.stride_col]);
    column += kFragmentColumns;
    element += kFragmentColumns * rows.stride_col;
  }
}

struct alignas(16) Chunk {
  uint32_t word[4];
};

// store_rows of 16-bit numbers where rows are whole chunks: of every four fragments each lane of a group writes one.
template <class E, int kTiles>
ATTENTION_DEVICE void store_chunks(const Rows<E>& to, int64_t first, int64_t end, const Fragment<float> (&from)[kTiles],
                                   const float (&factor)[2]) {
  ATTENTION_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int64_t row = first + r * 8 + lane_group();
    int column = lane_member() * kFragmentColumns;
    E* target = to.row(row) + column;
    ATTENTION_UNROLL
    for (int n = 0; n < kTiles; n += 4) {
      Chunk chunk;
      ATTENTION_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float* pair = from[n + i].number + 2 * r;
        chunk.word[i] = narrow_pair(E{}, pair[0] * factor[r], pair[1] * factor[r]);
      }
      transpose_in_group(chunk.word);
      if (row < end && column < to.columns) *reinterpret_cast<Chunk*>(target) = chunk;
      column += 4 * kFragmentColumns;
      target += 4 * kFragmentColumns;
    }
  }
}

// Writes 16 rows of fragments, each times factor[row], rounded to the dtype of `to`.
template <class E, class T, int kTiles>
ATTENTION_DEVICE void store_rows(const Rows<E>& to, int64_t first, int64_t end, const Fragment<T> (&from)[kTiles],
                                 const T (&factor)[2]) {
  if constexpr (sizeof(E) == 2 && kTiles % 4 == 0) {
    if (to.has_whole_chunks() && to.columns % kFragmentColumns == 0) return store_chunks(to, first, end, from, factor);
  }
  ATTENTION_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int64_t row = first + r * 8 + lane_group();
    if (row >= end) continue;
    for_each_column<kTiles>(
        to, row, [&](int n, int i, E& element) { element = rounded<E>(from[n].number[2 * r + i] * factor[r]); });
  }
}

}  // namespace
}  // namespace attention_ext
