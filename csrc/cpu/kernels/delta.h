// delta from an out that is computed once more, in float, and never rounded (core/delta.h).
#pragma once

#include "core/delta.h"
#include "cpu/kernels/backward_memory.h"
#include "cpu/kernels/forward.h"

namespace attention_ext {
namespace {

// Sum over d of a[d] * b[d], rows of head_dim_v numbers.
template <class T>
T dot_rows(Source a, Source b, int64_t columns) {
  Vec<T> sum{};
  with_storage<T>(a.dtype, [&](auto* a_storage) __attribute__((always_inline)) {
    with_storage<T>(b.dtype, [&](auto* b_storage) __attribute__((always_inline)) {
      const auto* x = reinterpret_cast<decltype(a_storage)>(const_cast<char*>(a.data));
      const auto* y = reinterpret_cast<decltype(b_storage)>(const_cast<char*>(b.data));
      for (int64_t d = 0; d < columns; d += kLanes<T>) {
        sum = fma(load_strided<T>(x + d * a.stride_col, a.stride_col, columns - d),
                  load_strided<T>(y + d * b.stride_col, b.stride_col, columns - d), sum);
      }
    });
  });
  return sum_lanes<T>(sum);
}

class DeltaJob : SoftmaxRun<FloatCompute, DeltaJob> {
  using Softmax = SoftmaxRun<FloatCompute, DeltaJob>;
  friend QueryRun<FloatCompute, DeltaJob>;

 public:
  static void run(const AttentionProblem& problem, void* shared_memory, void* scratch_memory, int64_t job) {
    const auto& p = static_cast<const BackwardProblem&>(problem);
    const auto shape = forward_shape<FloatCompute>(p);
    Arena scratch_arena(scratch_memory), shared_arena(shared_memory);
    const ForwardScratch<FloatCompute> scratch(scratch_arena, p, shape);
    const BackwardShared<FloatCompute> shared(shared_arena, p, BackwardShape<FloatCompute>(p));
    DeltaJob(p, shape, scratch, shared.delta).walk(job);
  }

 private:
  DeltaJob(const BackwardProblem& p, const RunShape<FloatCompute>& shape, const ForwardScratch<FloatCompute>& scratch,
           float* delta)
      : Softmax(p, shape, scratch), p_(p), delta_(delta) {}

  void close_tile(int64_t i) {
    const Tile& tile = tiles_[i];
    const int64_t row = row_of(p_, sequence_, tile.head) + tile.q.begin;
    const auto* grad_logsumexp = static_cast<const float*>(p_.grad_logsumexp);
    close_sums(i);
    for (int64_t r = 0; r < tile.q.size(); ++r) {
      const Source out{reinterpret_cast<const char*>(sums(i).row(r)), DType::kFloat32, 0, 1};
      const Source grad_out =
          source_of(p_.grad_out, sequence_.tensor_batch, tile.head, sequence_.begin_q + tile.q.begin + r);
      const float product = dot_rows<float>(out, grad_out, p_.head_dim_v) * scratch_.factor[r];
      delta_[row + r] = product - (grad_logsumexp ? grad_logsumexp[row + r] : 0.0f);
    }
  }

  const BackwardProblem& p_;
  float* delta_;
};

inline void add_delta_phase(const BackwardProblem& p, Plan& plan) {
  if (!needs_exact_delta(p)) return;
  const auto shape = forward_shape<FloatCompute>(p);
  Arena measure(nullptr);
  ForwardScratch<FloatCompute>(measure, p, shape);
  plan.phases[plan.phase_count++] = {shape.jobs, DeltaJob::run};
  plan.scratch_bytes = maximum(plan.scratch_bytes, measure.used());
}

}  // namespace
}  // namespace attention_ext
