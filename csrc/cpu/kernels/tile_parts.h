// Which keys a tile goes over, and in how many parts.
#pragma once

#include "core/score_mods.h"
#include "cpu/kernels/tile.h"

namespace attention_ext {
namespace {

// Calls f(keys) for each run of the keys in blocks that the sparse mask shows to the tile, without the keys at both
// ends that its bits hide; without a sparse mask for all keys.
template <class F>
ATTENTION_INLINE void for_each_run(const AttentionProblem& p, const Tile& tile, Range keys, F&& f) {
  const int64_t b = tile.sequence.batch, h = tile.head;
  while (!keys.empty()) {
    Range run = keys, seen = keys;
    if (p.sparse_mask) {
      run = p.sparse_mask.first_run(b, {h, h + 1}, tile.q, keys);
      seen = p.sparse_mask.seen_keys(b, h, tile.q, run);
    }
    if (!seen.empty()) f(seen);
    keys.begin = run.end;
  }
}

// The queries of one half of a tile, whose first is at `lane`.
template <class T>
ATTENTION_INLINE Tile half_of(const Tile& tile, int64_t lane) {
  const int64_t first = tile.q.begin + lane;
  const Range q{first, minimum(first + kQueries<T> / 2, tile.q.end)};
  return {tile.sequence, tile.head, q, ceil_div(q.size(), kLanes<T>)};
}

// Whether the sparse mask hides so many of the keys from a half of the tile that two parts cost less: as many scores as
// above the diagonal of a causal mask.
template <class T>
bool differs_in_halves(const AttentionProblem& p, const Tile& tile, Range keys) {
  const int64_t b = tile.sequence.batch, h = tile.head;
  if (p.sparse_mask.block_mask(b, h, tile.q, keys) == BlockMask::kFull) return false;
  int64_t seen = 0;
  for (const int64_t lane : {int64_t{0}, kQueries<T> / 2}) {
    seen += maximum<int64_t>(p.sparse_mask.seen_keys(b, h, half_of<T>(tile, lane).q, keys).size(), 0);
  }
  return 2 * keys.size() - seen >= kQueries<T> / 2;
}

// Calls f(tile, lane, keys) for the keys of k that a tile sees. Where a mask is partial and the halves of the tile see
// different keys, they come one by one, each with its own; lane is where a half begins. Keys begin at whole pairs.
template <class C, class F>
ATTENTION_INLINE void for_each_part(const AttentionProblem& p, const Tile& tile, Range k, F&& f) {
  using T = typename C::Scalar;
  constexpr int64_t kHalf = kQueryVectors / 2;
  const auto visible_in = [&](Range q) {
    const Range seen = visible_keys(p, tile.sequence, q);
    const int64_t begin = maximum(k.begin, seen.begin);
    return Range{begin - (begin - k.begin) % C::kPair, minimum(k.end, seen.end)};
  };
  const auto halves = [&](auto keys_of) {
    for (int64_t lane = 0; lane < tile.q.size(); lane += kHalf * kLanes<T>) {
      const Tile half = half_of<T>(tile, lane);
      for_each_run(p, half, keys_of(half.q), [&](Range keys) { f(half, lane, keys); });
    }
  };
  const Range all = visible_in(tile.q);
  if (all.empty()) return;
  const BlockMask mask = PositionMasks::of(p).block_mask(tile.q, all, tile.sequence.diagonal);
  if (tile.vectors > kHalf && mask != BlockMask::kFull) return halves(visible_in);
  for_each_run(p, tile, all, [&](Range keys) {
    if (p.sparse_mask && tile.vectors > kHalf && differs_in_halves<T>(p, tile, keys)) {
      halves([keys](Range) { return keys; });
    } else {
      f(tile, int64_t{0}, keys);
    }
  });
}

}  // namespace
}  // namespace attention_ext
