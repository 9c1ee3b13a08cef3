// A block of dot products and one of grad_out value^T become weights and score gradients; of second order, how these
// move along tangents of the inputs.
#pragma once

#include "gpu/kernels/backward_memory.h"
#include "gpu/kernels/dropout.h"
#include "gpu/kernels/softmax.h"
#include "gpu/kernels/sources.h"
#include "gpu/kernels/tangent.h"

namespace attention_ext {
namespace {

// Of one query: logsumexp and delta, and how they move.
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

// The tiles that own the rows and those that are walked, in the order of sources.h, queries against keys or the other
// way round.
template <class C, Rules kRules, Order kOrder, bool kTransposed, int kTiles>
class GradientBlock {
  using T = typename C::Scalar;
  using Block = ScoreBlock<T, kRules, kTransposed>;
  using Scores = Fragments<T, 1, kTiles>;
  static constexpr bool kSecond = kOrder == Order::kSecond;

 public:
  // What multiplies query or key for the gradient of the other; of second order `grad` multiplies the tangents.
  ATTENTION_DEVICE const Scores& main() const { return kSecond ? moved_grad : grad; }

  Scores weight;      // query . key, then what multiplies grad_out for grad_value
  Scores grad;        // grad_out . value, then the gradient of scale * query . key
  Scores moved;       // of second order: query . key as it moves
  Scores moved_grad;  // likewise, of grad_out . value, then of the gradient

  template <class Own, class Walked>
  ATTENTION_DEVICE void multiply(const ProblemOf<kOrder>& p, const Own& own, int row, const Walked& walked, int row_b) {
    weight.clear();
    grad.clear();
    multiply_rows<C>(weight, own.tile[0], row, walked.tile[0], row_b);
    multiply_rows<C>(grad, own.tile[1], row, walked.tile[1], row_b);
    if constexpr (kSecond) {
      moved.clear();
      moved_grad.clear();
      constexpr int kQueryTangent = 2, kKeyTangent = 2, kValueTangent = 3;
      if (kTransposed ? p.tangent.key : p.tangent.query) {
        multiply_rows<C>(moved, own.tile[kTransposed ? kKeyTangent : kQueryTangent], row, walked.tile[0], row_b);
      }
      if (kTransposed ? p.tangent.query : p.tangent.key) {
        multiply_rows<C>(moved, own.tile[0], row, walked.tile[kTransposed ? kQueryTangent : kKeyTangent], row_b);
      }
      if (p.tangent.value) {
        if constexpr (kTransposed) {
          multiply_rows<C>(moved_grad, own.tile[kValueTangent], row, walked.tile[1], row_b);
        } else {
          multiply_rows<C>(moved_grad, own.tile[1], row, walked.tile[kValueTangent], row_b);
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
      const T prob = weight_of<kRules>(score.score, block.linear(), row.logsumexp);
      const bool hidden = prob == T(0);
      const T centred = (kept ? g * kept_scale : T(0)) - row.delta;
      g = hidden ? T(0) : prob * centred;
      if constexpr (kSecond) {
        T &m = moved.tile[0][n].number[i], &mg = moved_grad.tile[0][n].number[i];
        const auto tangent = score_tangent(p, p.tangent, block, score, m, block.query(0, n, i), block.key(0, n, i));
        const T moved_prob = prob * (tangent.score - row.logsumexp_tangent);
        const T moved_centred = (kept ? mg * kept_scale : T(0)) - row.delta_tangent;
        const T second = hidden ? T(0) : multiply_add(moved_prob, centred, prob * moved_centred);
        each(n, i, second);
        w = hidden || !kept ? T(0) : moved_prob;
        mg = multiply_add(second, score.slope, g * score.curve * tangent.dot);
        any |= mg != T(0);
      } else {
        each(n, i, g);
        w = kept ? prob : T(0);
      }
      g *= score.slope;
      any |= g != T(0);
    });
    return any;
  }

  // sums += gradient . walked, for query or key
  template <class Sums, class Walked>
  ATTENTION_DEVICE void add_gradient(const ProblemOf<kOrder>& p, Sums& sums, const Walked& walked, int row) const {
    multiply_weights<C>(sums, main(), walked.tile[0], row);
    if constexpr (kSecond) {
      if (kTransposed ? p.tangent.query : p.tangent.key) multiply_weights<C>(sums, grad, walked.tile[2], row);
    }
  }
};

template <Rules kRules>
ATTENTION_DEVICE Dropout dropout_by(const AttentionProblem& p) {
  if constexpr (kRules == Rules::kAll) return dropout_of(p);
  return {};
}

}  // namespace
}  // namespace attention_ext
