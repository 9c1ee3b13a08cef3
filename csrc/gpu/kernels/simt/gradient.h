// Gradients of query, key, value, slopes and sinks: a warp for each query or key loops over the others.
#pragma once

#include "core/delta.h"
#include "gpu/kernels/head_gradient.h"
#include "gpu/kernels/simt/pair.h"

namespace attention_ext {
namespace {
namespace simt {

// rowsum(grad_out * out) - grad_logsumexp, from weights that were never rounded where core/delta.h asks for that.
template <class T>
struct Delta : QueryKernel<BackwardProblem> {
  ATTENTION_DEVICE static void run(const BackwardProblem& p, void* workspace) {
    Delta::with_query(p, [&](const Head& head, int q) {
      const BackwardMemory<T> memory(p, workspace);
      const PairGradients<T, Order::kFirst> gradients(p, head, memory);
      T sum = 0;
      if (needs_exact_delta(p)) {
        RowNumbers<T, Order::kFirst> row{};
        row.logsumexp = gradients.rows.logsumexp.row(q);
        const Span keys(visible_keys(p, head.sequence, {q, q + 1}));
        for (int k = keys.begin; k < keys.end; ++k) sum += gradients(q, k, row).score;
      } else {
        sum = dot<T>(gradients.grad_out, q, query_rows(head, p.out, p.head_dim_v), q);
      }
      if (lane_index() == 0) memory.store_delta(p, row_of(p, head.sequence, head.head) + q, sum);
    });
  }
};

// grad_query, and each block's part of the gradient of the head's slope.
template <class T, Order kOrder>
struct QueryGradient : QueryKernel<ProblemOf<kOrder>> {
  using Problem = ProblemOf<kOrder>;
  static constexpr size_t kSharedBytes = kWarps * sizeof(double);

  ATTENTION_DEVICE static void run(const Problem& p, void* workspace) {
    const BackwardMemory<T> memory(p, workspace);
    double slope = 0;
    QueryGradient::with_query(p, [&](const Head& head, int q) {
      const PairGradients<T, kOrder> gradients(p, head, memory);
      for_each_part<T>(p.grad_query ? p.head_dim : 0, [&](RowSum<T> sums) { slope = mainloop(p, gradients, q, sums); });
    });
    if (p.grad_alibi_slopes) {
      sum_block<kThreads>(lane_index() == 0 ? slope : 0.0, memory.slope_sums + QueryTileIndex(p, kWarps).number);
    }
  }

 private:
  ATTENTION_DEVICE static double mainloop(const Problem& p, const PairGradients<T, kOrder>& gradients, int q,
                                          RowSum<T>& sums) {
    const Head& head = gradients.pairs.head;
    const RowNumbers<T, kOrder> row = gradients.rows.row(q);
    const HeadRows key_tangent = gradients.key_tangent();
    double slope = 0;
    const Span keys(visible_keys(p, head.sequence, {q, q + 1}));
    for (int k = keys.begin; k < keys.end; ++k) {
      const PairGradient<T> gradient = gradients(q, k, row);
      if (p.grad_alibi_slopes) {
        const auto slope_grad = head.mods.alibi.slope_grad<NumberOps<T>>(gradients.pairs.block().at(q, k));
        slope += static_cast<double>(gradient.score * slope_grad);
      }
      if (!p.grad_query) continue;
      if (gradient.dot != T(0)) sums.add(gradient.dot, gradients.pairs.key, k);
      if (key_tangent && gradient.first_order_dot != T(0)) sums.add(gradient.first_order_dot, key_tangent, k);
    }
    if (p.grad_query) sums.store(static_cast<T>(p.scale), query_rows(head, p.grad_query, p.head_dim), q);
    return slope;
  }
};

// grad_key and grad_value, over all heads of a group.
template <class T, Order kOrder>
struct KeyGradient {
  using Problem = ProblemOf<kOrder>;
  static constexpr int kThreads = simt::kThreads;
  static constexpr size_t kSharedBytes = 0;

  static int64_t blocks(const AttentionProblem& p) { return KeyTileIndex::count(p, kWarps); }

  ATTENTION_DEVICE static void run(const Problem& p, void* workspace) {
    const KeyTileIndex at(p, kWarps);
    const Head first(p, at.batch, at.kv_head * p.group_size());
    const int k = static_cast<int>(at.tile) * kWarps + warp_index();
    if (k >= (p.cu_seqlens_k ? first.length_k : p.seqlen_k)) return;
    const BackwardMemory<T> memory(p, workspace);
    for_each_part<T>(maximum(p.head_dim, p.head_dim_v), [&](RowSum<T> key_sums) {
      RowSum<T> value_sums{key_sums.begin};
      for (int64_t h = 0; h < p.group_size(); ++h) {
        const Head head(p, first.sequence.batch, first.head + h);
        mainloop(p, PairGradients<T, kOrder>(p, head, memory), k, key_sums, value_sums);
      }
      if (p.grad_key) key_sums.store(static_cast<T>(p.scale), key_rows(first, p.grad_key, p.head_dim), k);
      if (p.grad_value) value_sums.store(T(1), key_rows(first, p.grad_value, p.head_dim_v), k);
    });
  }

 private:
  ATTENTION_DEVICE static void mainloop(const Problem& p, const PairGradients<T, kOrder>& gradients, int k,
                                        RowSum<T>& key_sums, RowSum<T>& value_sums) {
    const HeadRows query_tangent = gradients.query_tangent();
    const Span queries(visible_queries(p, gradients.pairs.head.sequence, {k, k + 1}));
    for (int q = queries.begin; q < queries.end; ++q) {
      const PairGradient<T> gradient = gradients(q, k, gradients.rows.row(q));
      if (p.grad_value && gradient.weight != T(0)) value_sums.add(gradient.weight, gradients.grad_out, q);
      if (!p.grad_key) continue;
      if (gradient.dot != T(0)) key_sums.add(gradient.dot, gradients.pairs.query, q);
      if (query_tangent && gradient.first_order_dot != T(0)) key_sums.add(gradient.first_order_dot, query_tangent, q);
    }
  }
};

}  // namespace simt
}  // namespace
}  // namespace attention_ext
