// softmax(scores) value by online softmax, a warp for each query.
#pragma once

#include "gpu/kernels/simt/pair.h"

namespace attention_ext {
namespace {
namespace simt {

template <class T>
struct Forward : QueryKernel<ForwardProblem> {
  ATTENTION_DEVICE static void run(const ForwardProblem& p, void*) {
    Forward::with_query(p, [&](const Head& head, int q) {
      for_each_part<T>(p.head_dim_v, [&](RowSum<T> sums) { mainloop(p, head, q, sums); });
    });
  }

 private:
  ATTENTION_DEVICE static void mainloop(const ForwardProblem& p, const Head& head, int q, RowSum<T>& sums) {
    const Pairs<T> pairs(p, head);
    const HeadRows value = key_rows(head, p.value, p.head_dim_v);
    T maximum = p.sinks ? static_cast<T>(pairs.sink()) : -infinity<T>(), sum = p.sinks ? T(1) : T(0);
    const Span keys(visible_keys(p, head.sequence, {q, q + 1}));
    for (int k = keys.begin; k < keys.end; ++k) {
      const T score = pairs.score(q, k).score, before = maximum;
      maximum = larger(score, before);
      const T base = finite_or_zero(maximum), weight = weight_of<ScoreMode::kAll>(score, T(1), base);
      if (maximum != before) {
        const T rescale = weight_of<ScoreMode::kAll>(before, T(1), base);
        sum *= rescale;
        sums.multiply(rescale);
      }
      sum += weight;
      const T kept = weight == T(0) ? T(0) : weight * pairs.kept(q, k);
      if (kept != T(0)) sums.add(kept, value, k);
    }
    sums.store(sum == T(0) ? T(0) : T(1) / sum, query_rows(head, p.out, p.head_dim_v), q);
    if (lane_index() == 0) {
      static_cast<T*>(p.logsumexp)[row_of(p, head.sequence, head.head) + q] =
          multiply_add(log2_of(sum), static_cast<T>(kLn2), maximum);
    }
  }
};

}  // namespace simt
}  // namespace
}  // namespace attention_ext
