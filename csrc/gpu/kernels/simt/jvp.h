// Tangents of out and logsumexp, a warp for each query.
#pragma once

#include "gpu/kernels/simt/pair.h"

namespace attention_ext {
namespace {
namespace simt {

template <class T>
struct Jvp : QueryKernel<JvpProblem> {
  using Problem = JvpProblem;

  ATTENTION_DEVICE static void run(const Problem& p, void* workspace) {
    Jvp::with_query(p, [&](const Head& head, int q) {
      T mean = 0, delta = 0;
      for_each_part<T>(p.head_dim_v, [&](RowSum<T> sums) {
        mean = mainloop(p, head, q, sums);
        delta += epilogue(p, head, q, mean, sums);
      });
      if (lane_index() != 0) return;
      const int64_t row = row_of(p, head.sequence, head.head) + q;
      static_cast<T*>(p.logsumexp_tangent)[row] = mean;
      if (p.wants_gradients()) BackwardMemory<T>(p, workspace).delta_tangent[row] = delta;
    });
  }

 private:
  // (P S') value + P value' to sums, after dropout. Returns rowsum(P S'), before it.
  ATTENTION_DEVICE static T mainloop(const Problem& p, const Head& head, int q, RowSum<T>& sums) {
    const Pairs<T> pairs(p, head);
    const PairTangents<T> tangents(pairs, p.tangent);
    const HeadRows value = key_rows(head, p.value, p.head_dim_v);
    const T logsumexp = LogsumexpRows<T>(p, head, p.logsumexp).row(q);
    T mean = sink_mean(p, pairs, logsumexp);
    const Span keys(visible_keys(p, head.sequence, {q, q + 1}));
    for (int k = keys.begin; k < keys.end; ++k) {
      const auto score = pairs.score(q, k);
      const T prob = weight_of<ScoreMode::kAll>(score.score, T(1), logsumexp);
      if (prob == T(0)) continue;  // hidden keys may hold anything
      const T product = prob * tangents.score(score, q, k).score, kept = pairs.kept(q, k);
      mean += product;
      if (kept == T(0)) continue;
      sums.add(product * kept, value, k);
      if (tangents.value) sums.add(prob * kept, tangents.value, k);
    }
    return mean;
  }

  ATTENTION_DEVICE static T sink_mean(const Problem& p, const Pairs<T>& pairs, T logsumexp) {
    if (!p.tangent.sinks) return T(0);
    const double prob = exp2_of((pairs.sink() - static_cast<double>(logsumexp)) * kLog2E);
    return static_cast<T>(prob * p.tangent.sinks[pairs.head.sequence.batch * p.heads + pairs.head.head]);
  }

  // Sums become out'. Returns rowsum(grad_out * out') of these columns, where gradients need it.
  ATTENTION_DEVICE static T epilogue(const Problem& p, const Head& head, int q, T mean, RowSum<T>& sums) {
    sums.add(-mean, query_rows(head, p.out, p.head_dim_v), q);
    if (p.out_tangent) sums.store(T(1), query_rows(head, p.out_tangent, p.head_dim_v), q);
    return p.wants_gradients() ? sums.dot(query_rows(head, p.grad_out, p.head_dim_v), q) : T(0);
  }
};

}  // namespace simt
}  // namespace
}  // namespace attention_ext
