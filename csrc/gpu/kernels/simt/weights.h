// The weights themselves, per head or averaged over heads: a warp for each query, a lane for each of its next keys.
#pragma once

#include "gpu/kernels/simt/pair.h"

namespace attention_ext {
namespace {
namespace simt {

template <class T>
struct Weights {
  using Problem = WeightsProblem;
  static constexpr int kThreads = simt::kThreads;
  static constexpr size_t kSharedBytes = 0;

  static int64_t blocks(const WeightsProblem& p) {
    return p.batch * head_runs(p) * ceil_div(p.row_end - p.row_begin, kWarps);
  }

  ATTENTION_DEVICE static void run(const WeightsProblem& p, void*) {
    const int64_t runs = head_runs(p), run = block_index() % runs, batch = block_index() / runs % p.batch;
    const int64_t q = p.row_begin + block_index() / runs / p.batch * kWarps + warp_index();
    if (q >= p.row_end) return;
    const int64_t heads = p.heads / runs;
    const int64_t to = batch * p.weights.stride_b + run * p.weights.stride_h + (q - p.row_begin) * p.weights.stride_row;
    for (int64_t k = 0; k < p.seqlen_k; k += kWarpSize) {
      T sum = 0;
      for (int64_t h = 0; h < heads; ++h) {
        sum += lane_weight(p, Head(p, batch, run * heads + h), static_cast<int>(q), k);
      }
      const auto columns = static_cast<int>(minimum<int64_t>(p.seqlen_k - k, kWarpSize));
      RowSum<T> row{0, {sum / static_cast<T>(heads)}};
      row.store(T(1), {p.weights, to + k * p.weights.stride_col, columns}, 0);
    }
  }

 private:
  ATTENTION_INLINE static int64_t head_runs(const WeightsProblem& p) { return p.average_heads ? 1 : p.heads; }

  // Of key first + lane.
  ATTENTION_DEVICE static T lane_weight(const WeightsProblem& p, const Head& head, int q, int64_t first) {
    const Pairs<T> pairs(p, head);
    const T logsumexp = LogsumexpRows<T>(p, head, p.logsumexp).row(q);
    const Range seen = visible_keys(p, head.sequence, {q, q + 1});
    const Span keys({maximum(first, seen.begin), minimum(first + kWarpSize, seen.end)});
    T own = 0;
    for (int k = keys.begin; k < keys.end; ++k) {
      const T prob = weight_of<ScoreMode::kAll>(pairs.score(q, k).score, T(1), logsumexp);
      if (k - first == lane_index()) own = prob == T(0) ? T(0) : prob * pairs.kept(q, k);
    }
    return own;
  }
};

}  // namespace simt
}  // namespace
}  // namespace attention_ext
