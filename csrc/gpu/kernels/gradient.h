// A block of dot products and one of grad_out value^T become weights and score gradients; and what the passes after
// forward know of their rows.
#pragma once

#include "gpu/kernels/dropout.h"
#include "gpu/kernels/softmax.h"

namespace attention_ext {
namespace {

// Of one query.
template <class T>
struct RowNumbers {
  T logsumexp, delta;
};

// Of one head; queries past the end, and those that see no key, have logsumexp +inf, which makes every weight 0.
template <class T>
struct RowSource {
  const T *logsumexp, *delta;
  int end;

  ATTENTION_DEVICE RowSource(const BackwardProblem& p, const Head& head, const T* all_deltas)
      : logsumexp(static_cast<const T*>(p.logsumexp) + row_of(p, head.sequence, head.head)),
        delta(all_deltas + row_of(p, head.sequence, head.head)),
        end(static_cast<int>(head.sequence.length_q)) {}

  ATTENTION_DEVICE RowNumbers<T> row(int q) const {
    if (q >= end || logsumexp[q] == -infinity<T>()) return {infinity<T>(), T(0)};
    return {logsumexp[q], delta[q]};
  }
};

// weight: query . key becomes prob, 0 where dropped; grad: grad_out . value becomes the gradient of scale * query .
// key. rows(n, i) gives RowNumbers, and each(n, i, x) receives every score gradient. Where a weight is 0 so is its
// gradient, whatever hidden values hold. True where any gradient of this lane is not 0.
template <Rules kRules, bool kTransposed, class T, int kTiles, class RowOf, class Each>
ATTENTION_DEVICE bool differentiate(const ScoreBlock<T, kRules, kTransposed>& block, const Dropout& dropout,
                                    Fragments<T, 1, kTiles>& weight, Fragments<T, 1, kTiles>& grad, RowOf&& rows,
                                    Each&& each) {
  bool any = false;
  const auto kept_scale = static_cast<T>(dropout.kept_scale);
  for_each_kept<1, kTiles>(block, dropout, [&](int m, int n, int i, bool kept) {
    const int q = block.query(m, n, i), k = block.key(m, n, i);
    T &w = weight.tile[m][n].number[i], &g = grad.tile[m][n].number[i];
    const RowNumbers<T> row = rows(n, i);
    const auto score = block.score(w, q, k);
    const T prob = weight_of<kRules>(score.score, block.linear(), row.logsumexp);
    const T gradient = prob == T(0) ? T(0) : prob * ((kept ? g * kept_scale : T(0)) - row.delta);
    each(n, i, gradient);
    w = kept ? prob : T(0);
    g = gradient * score.slope;
    any |= g != T(0);
  });
  return any;
}

template <Rules kRules>
ATTENTION_DEVICE Dropout dropout_by(const AttentionProblem& p) {
  if constexpr (kRules == Rules::kAll) return dropout_of(p);
  return {};
}

}  // namespace
}  // namespace attention_ext
