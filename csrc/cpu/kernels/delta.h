// delta from an out that is computed once more, in float, and never rounded (core/delta.h).
#pragma once

#include "core/delta.h"
#include "cpu/kernels/backward_memory.h"
#include "cpu/kernels/forward.h"

namespace attention_ext {
namespace {

// sums[r] = sum over d of a[r][d] * b[r][d]
template <class T>
void dot_rows(Source a, Source b, int64_t rows, int64_t columns, T* sums) {
  with_storage<T>(a.dtype, [&](auto* a_storage) __attribute__((always_inline)) {
    with_storage<T>(b.dtype, [&](auto* b_storage) __attribute__((always_inline)) {
      const auto* x = reinterpret_cast<decltype(a_storage)>(const_cast<char*>(a.data));
      const auto* y = reinterpret_cast<decltype(b_storage)>(const_cast<char*>(b.data));
      for (int64_t r = 0; r < rows; ++r) {
        Vec<T> sum{};
        for_each_vector_of_row<T>(columns, [&](int64_t d, auto count) __attribute__((always_inline)) {
          const auto* xs = x + r * a.stride_row + d * a.stride_col;
          const auto* ys = y + r * b.stride_row + d * b.stride_col;
          __builtin_prefetch(xs + kRowsAhead * a.stride_row);
          __builtin_prefetch(ys + kRowsAhead * b.stride_row);
          sum = fma(load_strided<T>(xs, a.stride_col, count), load_strided<T>(ys, b.stride_col, count), sum);
        });
        sums[r] = sum_lanes<T>(sum);
      }
    });
  });
}

class DeltaJob : SoftmaxRun<FloatCompute, DeltaJob> {
  using Softmax = SoftmaxRun<FloatCompute, DeltaJob>;
  friend QueryRun<FloatCompute, DeltaJob>;
  friend Softmax;

 public:
  static void run(const AttentionProblem& problem, void* shared_memory, void* scratch_memory, int64_t job) {
    const auto& p = static_cast<const BackwardProblem&>(problem);
    const auto shape = forward_shape<FloatCompute>(p);
    Arena scratch_arena(scratch_memory), shared_arena(shared_memory);
    const ForwardScratch<FloatCompute> scratch(scratch_arena, p, shape);
    DeltaJob(p, shape, scratch, take_rows<float>(shared_arena, p)).mainloop(job);
  }

 private:
  DeltaJob(const BackwardProblem& p, const RunShape<FloatCompute>& shape, const ForwardScratch<FloatCompute>& scratch,
           float* delta)
      : Softmax(p, shape, scratch), p_(p), delta_(delta) {}

  Source grad_out_rows(const Tile& tile) const {
    return source_of(p_.grad_out, sequence_.tensor_batch, tile.head, sequence_.begin_q + tile.q.begin);
  }
  RowsAhead epilogue_rows(const Tile& tile) const { return {grad_out_rows(tile), tile.q.size(), p_.head_dim_v}; }

  void epilogue(int64_t i) {
    const Tile& tile = tiles_[i];
    const int64_t row = row_of(p_, sequence_, tile.head) + tile.q.begin;
    const auto* grad_logsumexp = static_cast<const float*>(p_.grad_logsumexp);
    finish_sums(i);
    dot_rows(source_of(sums(i)), grad_out_rows(tile), tile.q.size(), p_.head_dim_v, delta_ + row);
    for (int64_t r = 0; r < tile.q.size(); ++r) {
      delta_[row + r] = delta_[row + r] * scratch_.factor[r] - (grad_logsumexp ? grad_logsumexp[row + r] : 0.0f);
    }
  }

  const BackwardProblem& p_;
  float* delta_;
};

// (b, h, q), from out as it was stored
template <class T>
void write_delta(const BackwardProblem& p, const Sequence& s, int64_t head, T* delta) {
  const int64_t row = row_of(p, s, head);
  dot_rows(source_of(p.out, s.tensor_batch, head, s.begin_q), source_of(p.grad_out, s.tensor_batch, head, s.begin_q),
           s.length_q, p.head_dim_v, delta + row);
  const T* grad_logsumexp = row_pointer<T>(p.grad_logsumexp, p, s, head);
  for (int64_t q = 0; grad_logsumexp && q < s.length_q; ++q) delta[row + q] -= grad_logsumexp[q];
}

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
