// How a block of scores moves along the tangents of the inputs.
#pragma once

#include "cpu/kernels/dropout.h"
#include "cpu/kernels/probability.h"

namespace attention_ext {
namespace {

// What one head's scores receive from tangents that are not matrices.
template <class T>
struct ScoreTangent {
  Matrix<const T> mask;  // staged like the mask itself, no data without it
  Vec<T> slope{};        // of ALiBi
  double scale = 1.0;

  // dot: how query . key moves. The score moves by the slope of the softcap times scale * dot, and by mask and ALiBi.
  ATTENTION_INLINE Vec<T> operator()(const Block<T>& block, const Derivatives<T>& bend, Vec<T> dot, int64_t r,
                                     int64_t lane) const {
    Vec<T> moved = dot * splat<T>(static_cast<T>(scale));
    if (bend.slope.data) moved *= load(bend.slope.row(r) + lane);
    if (mask.data) moved += load(mask.row(r) + lane);
    if (block.mods.alibi) {
      moved =
          fma(slope, block.mods.alibi.template by_slope<VectorOps<T>>(block.at(r, static_cast<int>(lane / kLanes<T>))),
              moved);
    }
    return moved;
  }
};

// `staged` is room for (kKeys, kQueries) numbers.
template <class T>
ScoreTangent<T> score_tangent_of(const AttentionProblem& p, const Tangents& tangent, const Tile& tile, Range k,
                                 Matrix<T> staged) {
  ScoreTangent<T> moved;
  moved.scale = p.scale;
  if (tangent.attn_mask) {
    stage_mask(tangent.attn_mask, tile, k, staged);
    moved.mask = as_operand(staged);
  }
  if (tangent.alibi_slopes) {
    moved.slope = splat<T>(static_cast<T>(tangent.alibi_slopes[tile.sequence.batch * p.heads + tile.head]));
  }
  return moved;
}

// Where the softcap's derivatives of a block are kept; nowhere without one.
template <class T>
Derivatives<T> bend_of(const Block<T>& block, T* slope, T* curve) {
  if (!block.mods.softcap) return {};
  return {{slope, kQueries<T>}, {curve, kQueries<T>}};
}

}  // namespace
}  // namespace attention_ext
