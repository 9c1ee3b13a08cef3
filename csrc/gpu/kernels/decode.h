// The forward pass for a few queries against many keys: parts of the keys apart, then merged in their order.
#pragma once

#include "gpu/kernels/backward_memory.h"
#include "gpu/kernels/forward.h"

namespace attention_ext {
namespace {

// A warp for each query.
template <class C>
struct MergeParts {
  using T = typename C::Scalar;
  using E = typename C::Element;
  using Problem = ForwardProblem;
  static constexpr int kThreads = 128, kQueries = kThreads / kWarpSize;
  static constexpr size_t kSharedBytes = 0;

  static int64_t blocks(const AttentionProblem& p) { return QueryTileIndex::count(p, kQueries); }

  ATTENTION_DEVICE static void run(const ForwardProblem& p, void* workspace) {
    const QueryTileIndex at(p, kQueries);
    const Head head(p, at.batch, at.head);
    const int64_t q = at.tile * kQueries + thread_index() / kWarpSize;
    if (q >= head.length_q) return;
    const SplitKvWorkspace<T> memory(p, workspace);
    const int64_t first = (at.batch * p.heads + at.head) * p.max_seqlen_q + q, step = memory.rows_of_part(p);
    const int64_t end = memory.rows(p);
    T maximum = -infinity<T>(), sum = 0;
    for (int64_t row = first; row < end; row += step) maximum = larger(memory.maximum[row], maximum);
    const T base = finite_or_zero(maximum);
    for (int64_t row = first; row < end; row += step) sum += memory.sum[row] * rescale(memory, row, base);
    const T factor = sum == T(0) ? T(0) : static_cast<T>(dropout_of(p).kept_scale) / sum;
    const Rows<E> out = head_rows<E>(head, p.out, p.head_dim_v);
    for (int d = lane_index(); d < out.columns; d += kWarpSize) {
      T total = 0;
      for (int64_t row = first; row < end; row += step) {
        total = multiply_add(memory.sums[row * p.head_dim_v + d], rescale(memory, row, base), total);
      }
      out.row(q)[d * out.stride_col] = rounded<E>(total * factor);
    }
    if (lane_index() == 0) {
      T* logsumexp = static_cast<T*>(p.logsumexp) + row_of(p, head.sequence, head.head);
      logsumexp[q] = multiply_add(log2_of(sum), static_cast<T>(kLn2), maximum);
    }
  }

 private:
  ATTENTION_DEVICE static T rescale(const SplitKvWorkspace<T>& memory, int64_t row, T base) {
    return exp2_of((memory.maximum[row] - base) * static_cast<T>(kLog2E));
  }
};

template <class C>
KernelPlan plan_decode_by_shape(const AttentionProblem& p) {
  return with_shape(p, [&](auto dim, auto mode) {
    using Kernel = Forward<C, dim, mode, Part::kSplit>;
    KernelPlan plan;
    set_workspace(plan, SplitKvWorkspace<typename C::Scalar>::bytes(p));
    add_launch<Kernel>(plan, Kernel::blocks(p));
    add_launch<MergeParts<C>>(plan, MergeParts<C>::blocks(p));
    return plan;
  });
}

}  // namespace
}  // namespace attention_ext
