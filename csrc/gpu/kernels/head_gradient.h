// The small kernels around a backward call: delta before it, and after it the sums over a whole head.
#pragma once

#include "gpu/kernels/gradient.h"

namespace attention_ext {
namespace {

// delta = rowsum(grad_out * out) - grad_logsumexp, a warp for each query.
template <class C>
struct Delta {
  using T = typename C::Scalar;
  using E = typename C::Element;
  using Problem = BackwardProblem;
  static constexpr int kThreads = 128, kQueries = kThreads / kWarpSize;
  static constexpr size_t kSharedBytes = 0;

  static int64_t blocks(const AttentionProblem& p) { return QueryTileIndex::count(p, kQueries); }

  ATTENTION_DEVICE static void run(const BackwardProblem& p, void* workspace) {
    const QueryTileIndex at(p, kQueries);
    const Head head(p, at.batch, at.head);
    const int64_t q = at.tile * kQueries + thread_index() / kWarpSize;
    if (q >= head.sequence.length_q) return;
    const Rows<E> out = head_rows<E>(head, p.out, p.head_dim_v),
                  grad_out = head_rows<E>(head, p.grad_out, p.head_dim_v);
    T sum = 0;
    for (int d = lane_index(); d < out.columns; d += kWarpSize) {
      sum = multiply_add(widen(out.row(q)[d * out.stride_col]), widen(grad_out.row(q)[d * grad_out.stride_col]), sum);
    }
    sum = sum_of_warp(sum);
    if (lane_index() == 0) {
      BackwardMemory<T>(p, workspace).store_delta(p, row_of(p, head.sequence, head.head) + q, sum);
    }
  }
};

// Gradients of one head's slope and sink. kQueries: of each block of threads that left a sum for the slopes.
template <class C, Order kOrder, int kQueries>
struct HeadGradient {
  using T = typename C::Scalar;
  using Problem = ProblemOf<kOrder>;
  static constexpr int kThreads = 128;
  static constexpr size_t kSharedBytes = kThreads / kWarpSize * sizeof(double);

  static int64_t blocks(const AttentionProblem& p) { return p.batch * p.heads; }

  ATTENTION_DEVICE static void run(const Problem& p, void* workspace) {
    const BackwardMemory<T> memory(p, workspace);
    const Head head(p, block_index() / p.heads, block_index() % p.heads);
    if (p.grad_alibi_slopes) {
      double sum = 0;
      for (int64_t tile = thread_index(); tile < ceil_div(head.length_q, kQueries); tile += kThreads) {
        sum += memory.slope_sums[QueryTileIndex::number_of(p, kQueries, head, tile)];
      }
      sum_block<kThreads>(sum, p.grad_alibi_slopes + block_index());
    }
    if (p.grad_sinks) sum_block<kThreads>(sink_sum(p, head, memory), p.grad_sinks + block_index());
  }

 private:
  // Sum over queries of prob(sink) times the derivative of the row's delta by the sink.
  ATTENTION_DEVICE static double sink_sum(const Problem& p, const Head& head, const BackwardMemory<T>& memory) {
    const RowSource<T, kOrder> rows(p, head, memory);
    const int64_t b = head.sequence.batch;
    const double sink = p.sinks[b * p.sinks_stride_b + head.head];
    double sink_tangent = 0, sum = 0;
    if constexpr (kOrder == Order::kSecond)
      sink_tangent = p.tangent.sinks ? p.tangent.sinks[b * p.heads + head.head] : 0.0;
    for (int q = thread_index(); q < rows.logsumexp.end; q += kThreads) {
      const RowNumbers<T, kOrder> row = rows.row(q);
      const double prob = exp2_of((sink - static_cast<double>(row.logsumexp)) * kLog2E);
      if constexpr (kOrder == Order::kSecond) {
        sum += prob * ((static_cast<double>(row.logsumexp_tangent) - sink_tangent) * static_cast<double>(row.delta) -
                       static_cast<double>(row.delta_tangent));
      } else {
        sum -= prob * static_cast<double>(row.delta);
      }
    }
    return sum;
  }
};

}  // namespace
}  // namespace attention_ext
