// The planners that the files of csrc/gpu/units compile: one pass for one dtype each, and simt.cu all of them, planned
// for a stream (by nvcc) or for the emulator (by any other compiler).
#pragma once

#include "gpu/plan.h"
#include "gpu/warp/numbers.h"

namespace attention_ext {

template <class Plan, class Element>
Plan plan_forward(const AttentionProblem& problem);
template <class Plan, class Element>
Plan plan_decode(const AttentionProblem& problem);
template <class Plan, class Element>
Plan plan_delta(const AttentionProblem& problem);  // the first launches of backward and double backward
template <class Plan, class Element>
Plan plan_backward(const AttentionProblem& problem);
template <class Plan, class Element>
Plan plan_weights(const AttentionProblem& problem);
template <class Plan, class Element>
Plan plan_jvp(const AttentionProblem& problem);
template <class Plan, class Element>
Plan plan_double_backward(const AttentionProblem& problem);

// Of a packed call: clears the results for rows that no sequence owns.
template <class Plan>
void add_clear_unowned(Plan& plan, Pass pass, const AttentionProblem& problem);

template <class Plan>
Plan plan_simt_forward(const AttentionProblem& problem);
template <class Plan>
Plan plan_simt_backward(const AttentionProblem& problem);
template <class Plan>
Plan plan_simt_weights(const AttentionProblem& problem);
template <class Plan>
Plan plan_simt_jvp(const AttentionProblem& problem);
template <class Plan>
Plan plan_simt_double_backward(const AttentionProblem& problem);

// pass(element) for the dtype of the problem
template <class Plan, class Pass>
Plan by_dtype(const AttentionProblem& problem, Pass&& pass) {
  switch (problem.dtype) {
    case DType::kFloat16:
      return pass(Half{});
    case DType::kBFloat16:
      return pass(BFloat16{});
    case DType::kFloat64:
      return pass(double{});
    default:
      return pass(float{});
  }
}

template <class Plan>
Plan plan_forward(const AttentionProblem& p) {
  return by_dtype<Plan>(p, [&]<class E>(E) { return plan_forward<Plan, E>(p); });
}

template <class Plan>
Plan plan_decode(const AttentionProblem& p) {
  return by_dtype<Plan>(p, [&]<class E>(E) { return plan_decode<Plan, E>(p); });
}

template <class Plan>
Plan plan_backward(const AttentionProblem& p) {
  return by_dtype<Plan>(p, [&]<class E>(E) { return plan_backward<Plan, E>(p); });
}

template <class Plan>
Plan plan_weights(const AttentionProblem& p) {
  return by_dtype<Plan>(p, [&]<class E>(E) { return plan_weights<Plan, E>(p); });
}

template <class Plan>
Plan plan_jvp(const AttentionProblem& p) {
  return by_dtype<Plan>(p, [&]<class E>(E) { return plan_jvp<Plan, E>(p); });
}

template <class Plan>
Plan plan_double_backward(const AttentionProblem& p) {
  return by_dtype<Plan>(p, [&]<class E>(E) { return plan_double_backward<Plan, E>(p); });
}

// A row's planner: the launches of the kernel itself, then the one that clears rows that no sequence owns.
template <class Plan, Plan (*kPlan)(const AttentionProblem&), Pass kPass>
Plan plan_row(const AttentionProblem& p) {
  Plan plan = kPlan(p);
  if (p.cu_seqlens_q) add_clear_unowned(plan, kPass, p);
  return plan;
}

}  // namespace attention_ext
