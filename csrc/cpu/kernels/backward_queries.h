// Memory that the jobs of a backward pass share, and its phases before and after the blocks (backward.h).
#pragma once

#include "cpu/kernels/delta.h"
#include "cpu/kernels/query_sums.h"

namespace attention_ext {
namespace {

ATTENTION_INLINE GradientJobs backward_jobs(const BackwardProblem& p) {
  return {p, p.max_seqlen_k, p.grad_attn_mask.stride_col};
}

template <class C>
struct BackwardShared {
  using T = typename C::Scalar;
  T* delta;
  SlopeSums slope_sums;
  QuerySums<T> query_sums;  // grad_query / scale

  BackwardShared(Arena& arena, const BackwardProblem& p, const BackwardShape<C>& shape, const GradientJobs& jobs,
                 int64_t dealt_rows = 0)
      : delta(take_rows<T>(arena, p)),
        slope_sums(arena, p, jobs.groups),
        query_sums(arena, p, jobs, shape.columns, shape.adds_queries, dealt_rows) {}
};

template <class C>
void deal_backward_queries(const AttentionProblem& problem, void* shared_memory, void*, int64_t) {
  const auto& p = static_cast<const BackwardProblem&>(problem);
  Arena arena(shared_memory);
  BackwardShared<C>(arena, p, BackwardShape<C>(p), backward_jobs(p)).query_sums.deal();
}

template <class C>
void run_backward_rows(const AttentionProblem& problem, void* shared_memory, void*, int64_t job) {
  const auto& p = static_cast<const BackwardProblem&>(problem);
  const BackwardShape<C> shape(p);
  const GradientJobs jobs = backward_jobs(p);
  Arena arena(shared_memory);
  const BackwardShared<C> shared(arena, p, shape, jobs);
  const int64_t head = job % p.heads;
  const Sequence s = sequence_of(p, job / p.heads);
  write_delta(p, s, head, shared.delta);
  for (int64_t group = 0; group < jobs.groups; ++group) {
    if (p.grad_alibi_slopes) shared.slope_sums.of(group, s, head) = 0.0;
    if (shape.adds_queries) shared.query_sums.clear(group, s, head);
  }
}

// Sum over queries of prob(sink) * f(q), the first derivative of anything by the sink of a head.
template <class T, class F>
ATTENTION_INLINE double sum_over_sink(const BackwardProblem& p, const Sequence& s, int64_t head, F&& f) {
  double sum = 0.0;
  for (int64_t q = 0; q < s.length_q; ++q) sum += sink_prob<T>(p, s, head, q) * f(q);
  return sum;
}

template <class C>
void run_backward_queries(const AttentionProblem& problem, void* shared_memory, void*, int64_t job) {
  using T = typename C::Scalar;
  const auto& p = static_cast<const BackwardProblem&>(problem);
  const BackwardShape<C> shape(p);
  Arena arena(shared_memory);
  const GradientJobs jobs = backward_jobs(p);
  const BackwardShared<C> shared(arena, p, shape, jobs);
  const int64_t head = job % p.heads;
  const Sequence s = sequence_of(p, job / p.heads);
  if (shape.adds_queries) shared.query_sums.write(p.grad_query, p.head_dim, s, head, p.scale);
  if (p.grad_alibi_slopes) p.grad_alibi_slopes[s.batch * p.heads + head] = shared.slope_sums.total(s, head);
  if (p.grad_sinks) {
    const T* delta = shared.delta + row_of(p, s, head);
    p.grad_sinks[s.batch * p.heads + head] =
        sum_over_sink<T>(p, s, head, [&](int64_t q) { return -static_cast<double>(delta[q]); });
  }
}

}  // namespace
}  // namespace attention_ext
