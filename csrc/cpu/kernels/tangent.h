// Tangents of a block of scores.
#pragma once

#include "cpu/kernels/dropout.h"
#include "cpu/kernels/probability.h"

namespace attention_ext {
namespace {

// The tangents of attn_mask and ALiBi slopes, as they enter the scores of one head.
template <class T>
struct ScoreTangent {
  Matrix<const T> mask;  // staged like the mask itself, no data without it
  Vec<T> slope{};        // of ALiBi

  // dot_tangent: tangent of scale * query . key; softcap_grad: the score's derivative by scale * query . key.
  template <class N>
  ATTENTION_INLINE Vec<T> operator()(const Block<T>& block, Vec<T> softcap_grad, Vec<T> dot_tangent, int64_t r,
                                     N n) const {
    Vec<T> tangent = dot_tangent * softcap_grad;
    if (mask.data) tangent += load(mask.row(r) + n * kLanes<T>);
    if (block.mods.has_slope()) {
      tangent = fma(slope, block.mods.alibi.template slope_grad<VectorOps<T>>(block.at(r, n)), tangent);
    }
    return tangent;
  }
};

// `staged` is room for (kKeys, kQueries) numbers.
template <class T>
ScoreTangent<T> score_tangent_of(const JvpProblem& p, const Tile& tile, Range k, Matrix<T> staged) {
  ScoreTangent<T> tangent;
  if (p.tangent.attn_mask) {
    stage_mask(p.tangent.attn_mask, tile, k, staged);
    tangent.mask = as_operand(staged);
  }
  if (p.tangent.alibi_slopes) {
    tangent.slope = splat<T>(static_cast<T>(p.tangent.alibi_slopes[tile.sequence.batch * p.heads + tile.head]));
  }
  return tangent;
}

// P and P S' of a block (key, query), before dropout.
template <class T>
struct Scores {
  Matrix<T> weight, tangent;
};

// With U = scale * query . key and score = f(U): dU = dS f' and dU' = dS' f' + dS f'' U'. `grad` is f', `grad2` f'' U'.
template <class T>
struct SoftcapGrads {
  Matrix<T> grad, grad2;
};

// From dot products in `scores.weight` and their tangents in `scores.tangent`. The sums of P S' are added to `mean`,
// per lane. `softcap_grads` is filled if it has room.
template <class C, int kVectors, ScoreMode kMode>
void scores_block(const Block<typename C::Scalar>& block, const typename C::Scalar* logsumexp,
                  const ScoreTangent<typename C::Scalar>& score_tangent, const Scores<typename C::Scalar>& scores,
                  const SoftcapGrads<typename C::Scalar>& softcap_grads, typename C::Scalar* mean) {
  using T = typename C::Scalar;
  const Probability<C, kVectors, kMode> probability(block, logsumexp);
  const Vec<T> scale = splat<T>(static_cast<T>(block.mods.scale));
  Vec<T> sum[kVectors] = {};  // of the block: long rows lose less that way
  for (int64_t r = 0; r < block.k.size(); ++r) {
    unroll<kVectors>(UNROLLED(n) {
      T *weight = scores.weight.row(r) + n * kLanes<T>, *tangent = scores.tangent.row(r) + n * kLanes<T>;
      const Weights<T> made = probability(r, n, load(weight));
      const Vec<T> dot = load(tangent) * scale;
      const Vec<T> product = made.weight * score_tangent(block, made.softcap_grad, dot, r, n);
      const Vec<T> visible = made.weight == Vec<T>{} ? Vec<T>{} : product;
      sum[n] += visible;
      store(weight, made.weight);
      store(tangent, visible);
      if (softcap_grads.grad.data) {
        store(softcap_grads.grad.row(r) + n * kLanes<T>, made.softcap_grad);
        store(softcap_grads.grad2.row(r) + n * kLanes<T>, made.softcap_grad2 * dot);
      }
    });
  }
  unroll<kVectors>(UNROLLED(n) { store(mean + n * kLanes<T>, load(mean + n * kLanes<T>) + sum[n]); });
}

}  // namespace
}  // namespace attention_ext
