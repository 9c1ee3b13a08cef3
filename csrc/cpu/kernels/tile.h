// A tile: up to kQueryVectors vectors of neighbouring queries of one head, against one block of keys. Scores lie as
// (key, query), queries across lanes, so that every softmax step is lane by lane.
#pragma once

#include "core/plan.h"
#include "core/varlen.h"
#include "cpu/kernels/pack.h"

namespace attention_ext {
namespace {

constexpr int kQueryVectors = 4;
template <class T>
constexpr int64_t kQueries = kQueryVectors * kLanes<T>;

// Keys of a block: 96 to 768 are within a point of each other; 192 x 64 scores fill 48 KB, with the packed operands
// half of L2.
constexpr int64_t kKeys = 192;

struct Tile {
  Sequence sequence;
  int64_t head;
  Range q;          // within the sequence
  int64_t vectors;  // that hold q
};

template <class T>
ATTENTION_INLINE Tile tile_of(const Sequence& s, int64_t head, int64_t index) {
  const Range q{index * kQueries<T>, minimum((index + 1) * kQueries<T>, s.length_q)};
  return {s, head, q, ceil_div(q.size(), kLanes<T>)};
}

template <class T>
ATTENTION_INLINE const T* row_pointer(const void* per_query, const AttentionProblem& p, const Sequence& s,
                                      int64_t head) {
  return per_query ? static_cast<const T*>(per_query) + row_of(p, s, head) : nullptr;
}

// The queries of a tile, with rows of 0 for spare lanes only where C pairs rows.
template <class C>
Matrix<const typename C::Element> tile_rows(const Source& from, const Tile& tile, int64_t columns,
                                            typename C::Element* buffer) {
  const int64_t padded = C::kPair == 1 ? tile.q.size() : tile.vectors * kLanes<typename C::Scalar>;
  return rows_of<C>(from, tile.q.size(), padded, columns, buffer);
}

// One number per query of a tile, 0 for spare lanes.
template <class T>
void load_rows(const T* per_query, const Tile& tile, T* to) {
  for (int64_t lane = 0; lane < tile.vectors * kLanes<T>; ++lane)
    to[lane] = lane < tile.q.size() ? per_query[lane] : T(0);
}

}  // namespace
}  // namespace attention_ext
