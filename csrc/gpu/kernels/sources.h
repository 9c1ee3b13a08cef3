// The rows of one head that a pass reads, in the order in which its products take them:
//   queries  query, grad_out, tangent of query          keys  key, value, tangents of key and value
// A null source means a zero tangent; its tile is 0 and its product is left out.
#pragma once

#include "gpu/kernels/rows.h"
#include "gpu/kernels/shape.h"

namespace attention_ext {
namespace {

template <class E, int kCount>
struct Sources {
  Rows<E> rows[kCount];
};

template <Order kOrder>
using ProblemOf = std::conditional_t<kOrder == Order::kFirst, BackwardProblem, DoubleBackwardProblem>;

template <class E>
ATTENTION_DEVICE Sources<E, 2> query_sources(const BackwardProblem& p, const Head& head) {
  return {{head_rows<E>(head, p.query, p.head_dim), head_rows<E>(head, p.grad_out, p.head_dim_v)}};
}
template <class E>
ATTENTION_DEVICE Sources<E, 3> query_sources(const DoubleBackwardProblem& p, const Head& head) {
  return {{head_rows<E>(head, p.query, p.head_dim), head_rows<E>(head, p.grad_out, p.head_dim_v),
           head_rows<E>(head, p.tangent.query, p.head_dim)}};
}

template <class E>
ATTENTION_DEVICE Sources<E, 2> key_sources(const AttentionProblem& p, const Head& head) {
  return {{key_rows<E>(head, p.key, p.head_dim), key_rows<E>(head, p.value, p.head_dim_v)}};
}
template <class E>
ATTENTION_DEVICE Sources<E, 4> key_sources(const JvpProblem& p, const Head& head) {
  return {{key_rows<E>(head, p.key, p.head_dim), key_rows<E>(head, p.value, p.head_dim_v),
           key_rows<E>(head, p.tangent.key, p.head_dim), key_rows<E>(head, p.tangent.value, p.head_dim_v)}};
}

template <Order kOrder>
constexpr int kQuerySources = kOrder == Order::kFirst ? 2 : 3;
template <Order kOrder>
constexpr int kKeySources = kOrder == Order::kFirst ? 2 : 4;

// The same rows of each source, in shared memory.
template <class Tile, int kCount>
struct TileSet {
  Tile tile[kCount];

  ATTENTION_DEVICE explicit TileSet(char* memory) {
    ATTENTION_UNROLL
    for (int i = 0; i < kCount; ++i) {
      tile[i] = {reinterpret_cast<typename Tile::Element*>(memory + i * Tile::kBytes)};
    }
  }
  static constexpr size_t kBytes = kCount * Tile::kBytes;
};

// The rows of each tile from `row` on, as operands that a warp reads again and again.
template <class C, class Tile, int kCount, bool kHeld, int kRowTiles = 1>
class OwnRows {
 public:
  ATTENTION_DEVICE OwnRows(const TileSet<Tile, kCount>& tiles, int row) : tiles_(tiles), row_(row) {}
  ATTENTION_DEVICE void load() {}
  ATTENTION_DEVICE TileRows<C, Tile> operator[](int i) const { return {tiles_.tile[i], row_}; }

 private:
  const TileSet<Tile, kCount> tiles_;
  const int row_;
};

// Held in registers.
template <class C, class Tile, int kCount, int kRowTiles>
class OwnRows<C, Tile, kCount, true, kRowTiles> {
 public:
  ATTENTION_DEVICE OwnRows(const TileSet<Tile, kCount>& tiles, int row) : tiles_(tiles), row_(row) {}
  ATTENTION_DEVICE void load() {
    commit_copies();
    wait_copies<0>();
    synchronize_block();
    ATTENTION_UNROLL
    for (int i = 0; i < kCount; ++i) held_[i].load(tiles_.tile[i], row_);
  }
  ATTENTION_DEVICE const HeldRows<C, kRowTiles, Tile::kColumns>& operator[](int i) const { return held_[i]; }

 private:
  const TileSet<Tile, kCount> tiles_;
  const int row_;
  HeldRows<C, kRowTiles, Tile::kColumns> held_[kCount];
};

template <int kThreads, class Tile, int kCount, class E>
ATTENTION_DEVICE void copy_set(const TileSet<Tile, kCount>& to, const Sources<E, kCount>& from, int first, Span valid) {
  ATTENTION_UNROLL
  for (int i = 0; i < kCount; ++i) copy_rows<kThreads>(to.tile[i], from.rows[i], first, valid);
}

// Numbers of rows that stream_rows keeps beside their tiles: none.
struct NoNumbers {
  ATTENTION_DEVICE void load(int) {}
  ATTENTION_DEVICE void store(int) {}
};

// Streams rows through shared memory, tile by tile, copying the next tiles while f works on the current ones. Calls
// f(first row, tiles, stage) for all tiles that hold some of `valid`; they begin at multiples of their height, and rows
// outside `valid` are 0. Numbers of the rows, one set for each stage, are loaded when their tiles are, and stored once
// no thread needs what that replaces.
template <int kThreads, int kStages, class Tile, int kCount, class E, class F, class Numbers = NoNumbers>
ATTENTION_DEVICE void stream_rows(char* memory, const Sources<E, kCount>& sources, Range valid, F&& f,
                                  Numbers&& numbers = {}) {
  using Set = TileSet<Tile, kCount>;
  const Span span(valid);
  commit_copies();  // of the tile that the block owns: the first wait is for it too, or the last where the loop is
                    // empty
  const auto copy = [&](int row, int stage) {
    if (row < span.end) copy_set<kThreads>(Set(memory + stage * Set::kBytes), sources, row, span);
    commit_copies();
    numbers.load(row);
  };
  const int first = span.begin / Tile::kRows * Tile::kRows;
  for (int s = 0; s < kStages - 1; ++s) {
    copy(first + s * Tile::kRows, s);
    numbers.store(s);
  }
  int stage = 0;
  for (int row = first; row < span.end; row += Tile::kRows) {
    const int free = (stage + kStages - 1) % kStages;
    copy(row + (kStages - 1) * Tile::kRows, free);
    if (kStages == 1) numbers.store(free);
    wait_copies<kStages - 1>();
    synchronize_block();
    f(row, Set(memory + stage * Set::kBytes), stage);
    if (kStages > 1) numbers.store(free);
    synchronize_block();
    stage = (stage + 1) % kStages;
  }
  wait_copies<0>();
}

}  // namespace
}  // namespace attention_ext
