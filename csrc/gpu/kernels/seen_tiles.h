// Which tiles of keys or queries a loop visits, and which of their rows it copies: with a block mask nothing of what
// lies in empty blocks.
#pragma once

#include "gpu/kernels/positions.h"
#include "gpu/kernels/shared_tile.h"

namespace attention_ext {
namespace {

// For ScoreMode::kMask, whose calls have no block mask.
struct AllTiles {
  ATTENTION_DEVICE int next(int row, int) const { return row; }
  ATTENTION_DEVICE Span rows(int, Span valid) const { return valid; }
};

// Rows of a tile; those of octets without a bit are left out.
struct SeenRows {
  Span valid;
  int first;  // of the tile
  uint32_t octets;

  ATTENTION_DEVICE bool has(int row) const { return valid.has(row) && (octets >> ((row - first) / 8) & 1) != 0; }
  ATTENTION_DEVICE bool covers(int row, int count) const {
    return valid.covers(row, count) && (~octets & bits_below(count / 8)) == 0;
  }
  ATTENTION_DEVICE static uint32_t bits_below(int octet) { return (1u << octet) - 1; }
};

// Tiles of kRows keys for queries of some heads.
template <int kRows>
struct SeenKeys {
  static_assert(kRows % 8 == 0 && kRows < 32 * 8);
  const AttentionProblem& p;
  const Head& head;
  Range heads, q;

  // Of the tiles from `row` on, the first with a key that some of the queries may see; `end` or more if none is left.
  ATTENTION_DEVICE int next(int row, int end) const {
    if (!p.sparse_mask) return row;
    while (row < end && octets(row) == 0) row += kRows;
    return row;
  }
  ATTENTION_DEVICE SeenRows rows(int first, Span valid) const {
    return {valid, first, p.sparse_mask ? octets(first) : ~0u};
  }

 private:
  // A bit for each octet of keys of a tile, set in blocks that are not empty for all of the queries.
  ATTENTION_DEVICE uint32_t octets(int first) const {
    const SparseMask& mask = p.sparse_mask;
    const int end = minimum(first + kRows, head.length_k);
    uint32_t found = 0;
    for (int k = first; k < end;) {
      const auto columns = static_cast<BlockIndex>(mask.block_k), block = static_cast<BlockIndex>(k) / columns;
      const int next = static_cast<int>(minimum<BlockIndex>(static_cast<BlockIndex>(end), (block + 1) * columns));
      if (mask.shows(head.sequence.batch, heads, q, block)) {
        found |= SeenRows::bits_below((next - first + 7) / 8) & ~SeenRows::bits_below((k - first) / 8);
      }
      k = next;
    }
    return found;
  }
};

// Tiles of kRows queries of one head for a tile of keys. A query that sees none of these moves no gradient.
template <int kRows>
struct SeenQueries {
  const AttentionProblem& p;
  const Head& head;
  Range k;

  ATTENTION_DEVICE int next(int row, int end) const {
    if (!p.sparse_mask) return row;
    while (row < end && is_empty(p, head, {row, row + kRows}, k)) row += kRows;
    return row;
  }
  ATTENTION_DEVICE Span rows(int, Span valid) const { return valid; }
};

template <ScoreMode kMode, int kRows>
ATTENTION_DEVICE auto seen_keys(const AttentionProblem& p, const Head& head, Range heads, Range q) {
  if constexpr (kMode == ScoreMode::kAll) {
    return SeenKeys<kRows>{p, head, heads, q};
  } else {
    return AllTiles{};
  }
}

template <ScoreMode kMode, int kRows>
ATTENTION_DEVICE auto seen_queries(const AttentionProblem& p, const Head& head, Range k) {
  if constexpr (kMode == ScoreMode::kAll) {
    return SeenQueries<kRows>{p, head, k};
  } else {
    return AllTiles{};
  }
}

}  // namespace
}  // namespace attention_ext
