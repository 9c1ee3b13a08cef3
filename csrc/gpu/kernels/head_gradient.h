// The small kernels around a backward call: delta before it, and after it what is summed for a whole head.
#pragma once

#include "gpu/kernels/backward_memory.h"
#include "gpu/kernels/key_walk.h"

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

  static int64_t blocks(const AttentionProblem& p) { return p.batch * p.heads * ceil_div(p.max_seqlen_q, kQueries); }

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
template <class C, int kQueries>
struct HeadGradient {
  using T = typename C::Scalar;
  using Problem = BackwardProblem;
  static constexpr int kThreads = 128;
  static constexpr size_t kSharedBytes = kThreads / kWarpSize * sizeof(double);

  static int64_t blocks(const AttentionProblem& p) { return p.batch * p.heads; }

  ATTENTION_DEVICE static void run(const BackwardProblem& p, void* workspace) {
    const BackwardMemory<T> memory(p, workspace);
    const int64_t head = block_index() % p.heads, batch = block_index() / p.heads;
    if (p.grad_alibi_slopes) {
      double sum = 0;
      for (int64_t i = thread_index(); i < ceil_div(p.max_seqlen_q, kQueries); i += kThreads) {
        sum += memory.slope_sums[i * p.batch * p.heads + block_index()];
      }
      sum_block<kThreads>(sum, p.grad_alibi_slopes + block_index());
    }
    if (p.grad_sinks)
      sum_block<kThreads>(sink_sum(p, memory, sequence_of(p, batch), head), p.grad_sinks + block_index());
  }

 private:
  ATTENTION_DEVICE static double sink_sum(const BackwardProblem& p, const BackwardMemory<T>& memory, const Sequence& s,
                                          int64_t head) {
    const int64_t first = row_of(p, s, head);
    const double sink = p.sinks[s.batch * p.sinks_stride_b + head];
    double sum = 0;
    for (int64_t q = thread_index(); q < s.length_q; q += kThreads) {
      const T logsumexp = static_cast<const T*>(p.logsumexp)[first + q];
      if (logsumexp == -infinity<T>()) continue;
      const double prob = exp2_of((sink - static_cast<double>(logsumexp)) * kLog2E);
      sum -= prob * static_cast<double>(memory.delta[first + q]);
    }
    return sum;
  }
};

}  // namespace
}  // namespace attention_ext
