// The phases of double backward before and after the tiles (double_backward.h).
#pragma once

#include "cpu/kernels/backward_queries.h"
#include "cpu/kernels/double_backward_memory.h"

namespace attention_ext {
namespace {

template <class C>
void run_double_backward_rows(const AttentionProblem& problem, void* shared_memory, void*, int64_t job) {
  const auto& p = static_cast<const BackwardProblem&>(problem);
  Arena arena(shared_memory);
  write_delta(p, sequence_of(p, job / p.heads), job % p.heads, take_rows<typename C::Scalar>(arena, p));
}

template <class C>
void run_double_backward_keys(const AttentionProblem& problem, void* shared_memory, void*, int64_t job) {
  using T = typename C::Scalar;
  const auto& p = static_cast<const DoubleBackwardProblem&>(problem);
  Arena arena(shared_memory);
  const GradientJobs jobs = double_backward_jobs(p);
  const DoubleBackwardShared<C> shared(arena, p, BackwardShape<C>(p), jobs.groups);
  const int64_t kv_head = job % p.kv_heads;
  const Sequence s = sequence_of(p, job / p.kv_heads);
  const int64_t length = key_rows_of(p, s), groups = jobs.groups_for(s.length_q);
  if (p.grad_key) shared.key_sums.write(p.grad_key, p.head_dim, s, kv_head, s.begin_k, length, groups, p.scale);
  if (p.grad_value) {
    const double kept_scale = dropout_of(p).kept_scale;
    shared.value_sums.write(p.grad_value, p.head_dim_v, s, kv_head, s.begin_k, length, groups, kept_scale);
  }
  for (int64_t head = kv_head * p.group_size(); head < (kv_head + 1) * p.group_size(); ++head) {
    const int64_t at = s.batch * p.heads + head, row = row_of(p, s, head);
    if (p.grad_alibi_slopes) p.grad_alibi_slopes[at] = shared.slope_sums.total(s, head);
    if (!p.grad_sinks) continue;
    const auto* mean = static_cast<const T*>(p.logsumexp_tangent) + row;
    const double sink_tangent = p.tangent.sinks ? p.tangent.sinks[at] : 0.0;
    p.grad_sinks[at] = sum_over_sink<T>(p, s, head, [&](int64_t q) {
      return (static_cast<double>(mean[q]) - sink_tangent) * static_cast<double>(shared.delta[row + q]) -
             static_cast<double>(shared.delta_tangent[row + q]);
    });
  }
}

}  // namespace
}  // namespace attention_ext
