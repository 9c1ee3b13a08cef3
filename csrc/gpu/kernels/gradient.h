// A block of dot products and one of grad_out value^T become weights and score gradients; of second order, their
// tangents.
#pragma once

#include "gpu/kernels/backward_memory.h"
#include "gpu/kernels/dropout.h"
#include "gpu/kernels/softmax.h"
#include "gpu/kernels/sources.h"
#include "gpu/kernels/tangent.h"

namespace attention_ext {
namespace {

// Of one query: logsumexp and delta, and their tangents.
template <class T>
struct RowNumbers {
  T logsumexp, delta, logsumexp_tangent, delta_tangent;
};

template <class T, Order kOrder>
struct RowSource {
  LogsumexpRows<T> logsumexp;
  const T *delta, *logsumexp_tangent = nullptr, *delta_tangent = nullptr;

  ATTENTION_DEVICE RowSource(const ProblemOf<kOrder>& p, const Head& head, const BackwardMemory<T>& memory)
      : logsumexp(p, head, p.logsumexp), delta(memory.delta + row_of(p, head.sequence, head.head)) {
    if constexpr (kOrder == Order::kSecond) {
      const int64_t first = row_of(p, head.sequence, head.head);
      logsumexp_tangent = static_cast<const T*>(p.logsumexp_tangent) + first;
      delta_tangent = memory.delta_tangent + first;
    }
  }

  ATTENTION_DEVICE RowNumbers<T> row(int q) const {
    const T normaliser = logsumexp.row(q);
    if (normaliser == infinity<T>()) return {normaliser, T(0), T(0), T(0)};
    if constexpr (kOrder == Order::kFirst) return {normaliser, delta[q], T(0), T(0)};
    return {normaliser, delta[q], logsumexp_tangent[q], delta_tangent[q]};
  }
};

// The tiles that own the rows and those that are streamed, in the order of sources.h: queries against keys, or keys
// against queries.
template <class C, ScoreMode kMode, Order kOrder, bool kTransposed, int kTiles>
class GradientBlock {
  using T = typename C::Scalar;
  using Block = ScoreBlock<T, kMode, kTransposed>;
  using Scores = Fragments<T, 1, kTiles>;
  static constexpr bool kSecond = kOrder == Order::kSecond;

 public:
  // The factor of query or key in the gradient of the other; of second order `grad` is that of their tangents.
  ATTENTION_DEVICE const Scores& main() const { return kSecond ? grad_tangent : grad; }

  Scores weight;        // query . key, then the factor of grad_out in grad_value
  Scores grad;          // grad_out . value, then the gradient of scale * query . key
  Scores dot_tangent;   // of second order: tangent of query . key
  Scores grad_tangent;  // likewise, of grad_out . value, then of the gradient

  template <class Own, class Streamed>
  ATTENTION_DEVICE void multiply(const ProblemOf<kOrder>& p, const Own& own, int row, const Streamed& streamed,
                                 int row_b) {
    weight.clear();
    grad.clear();
    multiply_rows<C>(weight, own.tile[0], row, streamed.tile[0], row_b);
    multiply_rows<C>(grad, own.tile[1], row, streamed.tile[1], row_b);
    if constexpr (kSecond) {
      dot_tangent.clear();
      grad_tangent.clear();
      constexpr int kQueryTangent = 2, kKeyTangent = 2, kValueTangent = 3;
      if (kTransposed ? p.tangent.key : p.tangent.query) {
        multiply_rows<C>(dot_tangent, own.tile[kTransposed ? kKeyTangent : kQueryTangent], row, streamed.tile[0],
                         row_b);
      }
      if (kTransposed ? p.tangent.query : p.tangent.key) {
        multiply_rows<C>(dot_tangent, own.tile[0], row, streamed.tile[kTransposed ? kQueryTangent : kKeyTangent],
                         row_b);
      }
      if (p.tangent.value) {
        if constexpr (kTransposed) {
          multiply_rows<C>(grad_tangent, own.tile[kValueTangent], row, streamed.tile[1], row_b);
        } else {
          multiply_rows<C>(grad_tangent, own.tile[1], row, streamed.tile[kValueTangent], row_b);
        }
      }
    }
  }

  // rows(n, i) gives RowNumbers, and each(n, i, x) receives every gradient of a score. Where a weight is 0 so is its
  // gradient, whatever hidden values hold. True where any gradient of this lane is not 0.
  template <class RowOf, class Each>
  ATTENTION_DEVICE bool differentiate(const ProblemOf<kOrder>& p, const Block& block, const Dropout& dropout,
                                      RowOf&& rows, Each&& each) {
    bool any = false;
    const auto kept_scale = static_cast<T>(dropout.kept_scale);
    for_each_kept<1, kTiles>(block, dropout, [&](int, int n, int i, bool kept) {
      T &w = weight.tile[0][n].number[i], &g = grad.tile[0][n].number[i];
      const RowNumbers<T> row = rows(n, i);
      const auto score = block.score(w, block.query(0, n, i), block.key(0, n, i));
      const T prob = weight_of<kMode>(score.score, block.exp_scale(), row.logsumexp);
      const bool hidden = prob == T(0);
      const T centred = (kept ? g * kept_scale : T(0)) - row.delta;
      g = hidden ? T(0) : prob * centred;
      if constexpr (kSecond) {
        T &dt = dot_tangent.tile[0][n].number[i], &gt = grad_tangent.tile[0][n].number[i];
        const auto tangent = score_tangent(p, p.tangent, block, score, dt, block.query(0, n, i), block.key(0, n, i));
        const T prob_tangent = prob * (tangent.score - row.logsumexp_tangent);
        const T centred_tangent = (kept ? gt * kept_scale : T(0)) - row.delta_tangent;
        const T second = hidden ? T(0) : multiply_add(prob_tangent, centred, prob * centred_tangent);
        each(n, i, second);
        w = hidden || !kept ? T(0) : prob_tangent;
        gt = multiply_add(second, score.softcap_grad, g * score.softcap_grad2 * tangent.dot);
        any |= gt != T(0);
      } else {
        each(n, i, g);
        w = kept ? prob : T(0);
      }
      g *= score.softcap_grad;
      any |= g != T(0);
    });
    return any;
  }

  // sums += gradient . streamed, for query or key
  template <class Sums, class Streamed>
  ATTENTION_DEVICE void add_gradient(const ProblemOf<kOrder>& p, Sums& sums, const Streamed& streamed, int row) const {
    multiply_weights<C>(sums, main(), streamed.tile[0], row);
    if constexpr (kSecond) {
      if (kTransposed ? p.tangent.query : p.tangent.key) multiply_weights<C>(sums, grad, streamed.tile[2], row);
    }
  }
};

template <ScoreMode kMode>
ATTENTION_DEVICE Dropout dropout_by(const AttentionProblem& p) {
  if constexpr (kMode == ScoreMode::kAll) return dropout_of(p);
  return {};
}

}  // namespace
}  // namespace attention_ext
