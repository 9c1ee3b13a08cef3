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

  // dot: how scale * query . key moves; bend: the score's derivative by that. Mask and ALiBi move it too.
  template <class N>
  ATTENTION_INLINE Vec<T> operator()(const Block<T>& block, Vec<T> bend, Vec<T> dot, int64_t r, N n) const {
    Vec<T> moved = dot * bend;
    if (mask.data) moved += load(mask.row(r) + n * kLanes<T>);
    if (block.mods.alibi) moved = fma(slope, block.mods.alibi.template by_slope<VectorOps<T>>(block.at(r, n)), moved);
    return moved;
  }
};

// `staged` is room for (kKeys, kQueries) numbers.
template <class T>
ScoreTangent<T> score_tangent_of(const JvpProblem& p, const Tile& tile, Range k, Matrix<T> staged) {
  ScoreTangent<T> moved;
  if (p.tangent.attn_mask) {
    stage_mask(p.tangent.attn_mask, tile, k, staged);
    moved.mask = as_operand(staged);
  }
  if (p.tangent.alibi_slopes) {
    moved.slope = splat<T>(static_cast<T>(p.tangent.alibi_slopes[tile.sequence.batch * p.heads + tile.head]));
  }
  return moved;
}

// P and P S' of a block (key, query), before dropout.
template <class T>
struct Scores {
  Matrix<T> weight, moved;
};

// What bent scores make of gradients: dU = dS slope, and dU' = dS' slope + dS curve, with curve the second derivative
// times how scale * dot moves.
template <class T>
struct Bend {
  Matrix<T> slope, curve;
};

// From dot products in `scores.weight`, and how they move in `scores.moved`. The sums of P S' are added to `mean`, per
// lane. `bend` is filled if it has room.
template <class C, int kVectors, Rules kRules>
void scores_block(const Block<typename C::Scalar>& block, const typename C::Scalar* logsumexp,
                  const ScoreTangent<typename C::Scalar>& score_tangent, const Scores<typename C::Scalar>& scores,
                  const Bend<typename C::Scalar>& bend, typename C::Scalar* mean) {
  using T = typename C::Scalar;
  const Probability<C, kVectors, kRules> probability(block, logsumexp);
  const Vec<T> scale = splat<T>(static_cast<T>(block.mods.scale));
  Vec<T> sum[kVectors] = {};  // of the block: long rows lose less that way
  for (int64_t r = 0; r < block.k.size(); ++r) {
    unroll<kVectors>(UNROLLED(n) {
      T *weight = scores.weight.row(r) + n * kLanes<T>, *moved = scores.moved.row(r) + n * kLanes<T>;
      const Weights<T> made = probability(r, n, load(weight));
      const Vec<T> dot = load(moved) * scale;
      const Vec<T> product = made.weight * score_tangent(block, made.slope, dot, r, n);
      const Vec<T> seen = made.weight == Vec<T>{} ? Vec<T>{} : product;
      sum[n] += seen;
      store(weight, made.weight);
      store(moved, seen);
      if (bend.slope.data) {
        store(bend.slope.row(r) + n * kLanes<T>, made.slope);
        store(bend.curve.row(r) + n * kLanes<T>, made.curve * dot);
      }
    });
  }
  unroll<kVectors>(UNROLLED(n) { store(mean + n * kLanes<T>, load(mean + n * kLanes<T>) + sum[n]); });
}

}  // namespace
}  // namespace attention_ext
