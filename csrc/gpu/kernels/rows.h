// Which rows a block of threads owns, where they lie, and how results get there.
#pragma once

#include "gpu/kernels/positions.h"
#include "gpu/kernels/tile_order.h"

namespace attention_ext {
namespace {

// Which tile of queries a block of threads owns; the last ones, the longest of a causal call, come first.
struct QueryTileIndex {
  int64_t batch, head, tile;
  int64_t number;  // below count(), the same in any order

  template <class Problem>
  ATTENTION_DEVICE QueryTileIndex(const Problem& p, int queries, int64_t index = block_index()) {
    const SequenceTiles tiles = SequenceTiles::of_queries(p, queries);
    const int64_t keys = seen_rows(p, queries, p.max_seqlen_k);
    const TileOrder order(tiles.runs() * p.kv_heads, group_size_of(p), tiles.places(), keys * streamed_bytes(p),
                          streaming_cache(p));
    const auto [lane, place] = order.at(index);
    const auto heads = static_cast<uint32_t>(p.heads);
    const SequenceTiles::Place last_first{lane / heads, tiles.places() - 1 - place};
    const SequenceTile own = tiles.at(last_first);
    batch = own.batch;
    head = lane % heads;
    tile = own.index;
    number = number_of(p, tiles, last_first, head);
  }
  ATTENTION_INLINE static int64_t count(const AttentionProblem& p, int queries) {
    return SequenceTiles::of_queries(p, queries).count() * p.heads;
  }
  ATTENTION_DEVICE static int64_t number_of(const AttentionProblem& p, int queries, const Head& head, int64_t tile) {
    const SequenceTiles tiles = SequenceTiles::of_queries(p, queries);
    return number_of(p, tiles, tiles.of({head.sequence.batch, tile}), head.head);
  }
  ATTENTION_DEVICE Range queries(const Sequence& s, int queries) const {
    return {tile * queries, minimum((tile + 1) * queries, s.length_q)};
  }

 private:
  ATTENTION_INLINE static int64_t number_of(const AttentionProblem& p, const SequenceTiles& tiles,
                                            const SequenceTiles::Place& at, int64_t head) {
    return (at.run * tiles.places() + at.place) * p.heads + head;
  }
};

// Likewise a tile of keys of one key head; here the first ones are the longest of a causal call.
struct KeyTileIndex {
  int64_t batch, kv_head, tile;

  template <class Problem>
  ATTENTION_DEVICE KeyTileIndex(const Problem& p, int keys, int64_t index = block_index()) {
    const SequenceTiles tiles = SequenceTiles::of_keys(p, keys);
    const int64_t queries = seen_rows(p, keys, p.max_seqlen_q) * group_size_of(p);
    const TileOrder order(tiles.runs() * p.kv_heads, 1, tiles.places(), queries * streamed_bytes(p),
                          streaming_cache(p));
    const auto [lane, place] = order.at(index);
    const auto heads = static_cast<uint32_t>(p.kv_heads);
    const SequenceTile own = tiles.at({lane / heads, place});
    batch = own.batch;
    kv_head = lane % heads;
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
    if (to.whole_chunks && to.columns % kFragmentColumns == 0) return store_chunks(to, first, end, from, factor);
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
