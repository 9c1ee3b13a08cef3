// The rows of one head that a pass reads, in the order in which its products take them:
//   queries  query, grad_out, tangent of query          keys  key, value, tangents of key and value
// A null source means a zero tangent; its tile is 0 and its product is left out.
#pragma once

#include "gpu/kernels/rows.h"
#include "gpu/kernels/seen_tiles.h"
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

// Tiles of streamed rows: as they are in memory, or split.
template <class C, class Shape, int kDim>
using StreamedTile = std::conditional_t<Shape::kSplits, SplitTile<SharedTile<typename C::Element, Shape::kRows, kDim>>,
                                        SharedTile<typename C::Element, Shape::kRows, kDim>>;

template <class Tile>
constexpr bool kIsSplit = false;
template <class Tile>
constexpr bool kIsSplit<SplitTile<Tile>> = true;

// The same rows of each source, in shared memory.
template <class Tile, int kCount>
struct TileSet {
  Tile tile[kCount];

  ATTENTION_DEVICE explicit TileSet(char* memory) {
    ATTENTION_UNROLL
    for (int i = 0; i < kCount; ++i) tile[i] = Tile::in(memory + i * Tile::kBytes);
  }
  static constexpr size_t kBytes = kCount * Tile::kBytes;
};

// The rows of each tile from `row` on, as operands that a warp reads again and again.
template <class C, class Tile, int kCount, bool kHeld, int kRowTiles = 1>
class OwnRows {
 public:
  ATTENTION_DEVICE OwnRows(const TileSet<Tile, kCount>& tiles, int row) : tiles_(tiles), row_(row) {}
  ATTENTION_DEVICE void load() {}
  static constexpr size_t kBytes = TileSet<Tile, kCount>::kBytes;  // of shared memory, from load() on
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
    synchronize_block();
  }
  static constexpr size_t kBytes = 0;
  ATTENTION_DEVICE const HeldRows<C, kRowTiles, Tile::kColumns>& operator[](int i) const { return held_[i]; }

 private:
  const TileSet<Tile, kCount> tiles_;
  const int row_;
  HeldRows<C, kRowTiles, Tile::kColumns> held_[kCount];
};

template <int kThreads, class Tile, int kCount, class E, class Valid>
ATTENTION_DEVICE void copy_set(const TileSet<Tile, kCount>& to, const Sources<E, kCount>& from, int first,
                               const Valid& valid) {
  ATTENTION_UNROLL
  for (int i = 0; i < kCount; ++i) copy_rows<kThreads>(to.tile[i], from.rows[i], first, valid);
}

// Bytes of shared memory that stream_rows needs.
template <class Tile, int kCount, int kStages>
constexpr size_t kStreamBytes = kStages * TileSet<Tile, kCount>::kBytes;
template <class Part, int kCount, int kStages>
constexpr size_t kStreamBytes<SplitTile<Part>, kCount, kStages> = (kStages + 1) * TileSet<Part, kCount>::kBytes;

// Every number of the tiles becomes two. The threads of the block share the work.
template <int kThreads, class Tile, int kCount>
ATTENTION_DEVICE void split_set(const TileSet<SplitTile<Tile>, kCount>& to, const TileSet<Tile, kCount>& from) {
  using Numbers = Neighbours<typename Tile::Element, 4>;
  constexpr int kNumbers = static_cast<int>(Tile::kBytes / sizeof(Numbers));
  static_assert(kNumbers % kThreads == 0);
  ATTENTION_UNROLL
  for (int i = 0; i < kCount; ++i) {
    ATTENTION_UNROLL
    for (int first = 0; first < kNumbers; first += kThreads) {
      const auto place = [&](const Tile& tile) {
        return reinterpret_cast<Numbers*>(tile.data) + first + thread_index();
      };
      const Numbers x = load_shared(place(from.tile[i]));
      Numbers big, rest;
      ATTENTION_UNROLL
      for (int n = 0; n < 4; ++n) {
        const SplitFloat split(x.number[n]);
        big.number[n] = split.big;
        rest.number[n] = split.rest;
      }
      store_shared(place(to.tile[i].big), big);
      store_shared(place(to.tile[i].rest), rest);
    }
  }
}

// Numbers of rows that stream_rows keeps beside their tiles: none.
struct NoNumbers {
  ATTENTION_DEVICE void load(int) {}
  ATTENTION_DEVICE void store(int) {}
};

// Streams rows through shared memory, tile by tile, copying the next tiles while f works on the current ones. Calls
// f(first row, tiles, stage) for those of the `seen` tiles that hold some of `valid`; they begin at multiples of their
// height, and rows outside `valid` or not seen are 0. Numbers of the rows, one set for each stage, are loaded when
// their tiles are, and stored once no thread needs what that replaces.
template <int kThreads, int kStages, class Tile, int kCount, class E, class Seen, class F, class Numbers = NoNumbers>
ATTENTION_DEVICE void stream_rows(char* memory, const Sources<E, kCount>& sources, Range valid, const Seen& seen, F&& f,
                                  Numbers&& numbers = {}) {
  static_assert(kStages == 1 || kStages == 2);
  using Set = TileSet<Tile, kCount>;
  const Span span(valid);
  commit_copies();  // of the tile that the block owns: the first wait is for it too, or the last where the loop is
                    // empty
  const auto copy = [&](int row, int stage) {
    if (row < span.end) copy_set<kThreads>(Set(memory + stage * Set::kBytes), sources, row, seen.rows(row, span));
    commit_copies();
    numbers.load(row);
  };
  const int first = seen.next(span.begin / Tile::kRows * Tile::kRows, span.end);
  if (kStages == 2) {
    copy(first, 0);
    numbers.store(0);
  }
  int stage = 0;
  for (int row = first; row < span.end; row = seen.next(row + Tile::kRows, span.end)) {
    const int free = (stage + kStages - 1) % kStages;
    copy(kStages == 1 ? row : seen.next(row + Tile::kRows, span.end), free);
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

// Likewise, where f works on split tiles. Of two stages one is for the next rows as they arrive; in one stage they
// arrive where their big parts will be, once f is done.
template <int kThreads, int kStages, class Tile, int kCount, class E, class Seen, class F, class Numbers = NoNumbers>
  requires kIsSplit<Tile>
ATTENTION_DEVICE void stream_rows(char* memory, const Sources<E, kCount>& sources, Range valid, const Seen& seen, F&& f,
                                  Numbers&& numbers = {}) {
  constexpr bool kAhead = kStages == 2;
  const TileSet<Tile, kCount> tiles(memory);
  TileSet<typename Tile::Part, kCount> arriving(memory + tiles.kBytes);
  ATTENTION_UNROLL
  for (int i = 0; i < kCount && !kAhead; ++i) arriving.tile[i] = tiles.tile[i].big;
  const Span span(valid);
  const auto copy = [&](int row) {
    if (row < span.end) copy_set<kThreads>(arriving, sources, row, seen.rows(row, span));
    commit_copies();
    numbers.load(row);
  };
  const int first = seen.next(span.begin / Tile::kRows * Tile::kRows, span.end);
  copy(first);
  for (int row = first; row < span.end; row = seen.next(row + Tile::kRows, span.end)) {
    wait_copies<0>();
    synchronize_block();
    split_set<kThreads>(tiles, arriving);
    numbers.store(0);
    synchronize_block();
    if (kAhead) copy(seen.next(row + Tile::kRows, span.end));
    f(row, tiles, 0);
    if (kAhead) continue;
    synchronize_block();
    copy(seen.next(row + Tile::kRows, span.end));
  }
  wait_copies<0>();
}

}  // namespace
}  // namespace attention_ext
