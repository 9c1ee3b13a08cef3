// A block of scores of a tile: its keys that are visible, and the mods that change it.
#pragma once

#include "core/score_mods.h"
#include "cpu/kernels/staged_mask.h"

namespace attention_ext {
namespace {

// One block of scores of a tile, and the mods that change it.
template <class T>
struct Block {
  Range k;  // within the sequence
  ScoreMods mods;
  ScoreMode mode;
  Matrix<const T> bias;                  // staged mask
  Vec<T> first_distance[kQueryVectors];  // k.begin - diagonal(q)

  ATTENTION_INLINE Position<VectorOps<T>> at(int64_t row, int vector) const {
    return {first_distance[vector] + splat<T>(static_cast<T>(row)),
            mods.reads_bias() ? load(bias.row(row) + vector * kLanes<T>) : Vec<T>{}};
  }
};

// False where the block holds no visible key; otherwise block.k is k without the keys at both ends that attn_mask and
// the sparse mask hide. `bias` is room for (kKeys, kQueries) numbers.
template <class T>
bool make_block(const AttentionProblem& p, const Tile& tile, Range k, Matrix<T> bias, Block<T>& block) {
  block.mods = score_mods_of(p, tile.sequence, tile.head);
  block.k = k;
  BlockMask bias_block = BlockMask::kFull;
  if (block.mods.reads_bias()) {
    const Staged staged = stage_mask(p.attn_mask, tile, k, bias);
    block.k = staged.visible;
    bias_block = staged.mask;
  }
  if (p.sparse_mask && !block.k.empty()) {
    const Staged staged = stage_sparse<T>(p.sparse_mask, tile, block.k, static_cast<bool>(p.attn_mask),
                                          rows_from(bias, block.k.begin - k.begin));
    block.k = staged.visible;
    bias_block = minimum(bias_block, staged.mask);
    block.mods.bias.present = true;
  }
  if (block.k.empty()) return false;
  if (block.mods.reads_bias()) block.bias = as_operand(rows_from(bias, block.k.begin - k.begin));
  const BlockMask mask = block.mods.restrict_to(tile.q, block.k, tile.sequence.diagonal, bias_block);
  if (mask == BlockMask::kEmpty) return false;
  block.mode = block.mods.mode();
  const auto distance = static_cast<T>(block.k.begin - tile.q.begin - tile.sequence.diagonal);
  for (int v = 0; v < kQueryVectors; ++v) {
    block.first_distance[v] = splat<T>(distance - static_cast<T>(v * kLanes<T>)) - iota<T>();
  }
  return true;
}

// Calls f with the vector count and the mode as constants.
template <class F>
ATTENTION_INLINE void with_constants(int64_t vectors, ScoreMode mode, F&& f) {
  unroll<kQueryVectors>(UNROLLED(n) {
    if (vectors != n + 1) return;
    constexpr auto kCount = std::integral_constant<int, n + 1>{};
    switch (mode) {
      case ScoreMode::kNone:
        f(kCount, std::integral_constant<ScoreMode, ScoreMode::kNone>{});
        break;
      case ScoreMode::kMask:
        f(kCount, std::integral_constant<ScoreMode, ScoreMode::kMask>{});
        break;
      case ScoreMode::kSoftcap:
        f(kCount, std::integral_constant<ScoreMode, ScoreMode::kSoftcap>{});
        break;
      case ScoreMode::kAll:
        f(kCount, std::integral_constant<ScoreMode, ScoreMode::kAll>{});
        break;
    }
  });
}

}  // namespace
}  // namespace attention_ext
