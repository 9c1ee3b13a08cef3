// Gradients of every input from grad_out and grad_logsumexp, each in one place and in a fixed order:
//   delta    rowsum(grad_out * out) - grad_logsumexp
//   queries  grad_query, walking keys      keys   grad_key and grad_value, walking queries
//   mask     grad_attn_mask                heads  gradients of slopes and sinks
// Of second order the same, after the jvp has dot_tangent the rows.
#pragma once

#include "core/delta.h"
#include "gpu/kernels/head_gradient.h"
#include "gpu/kernels/key_gradient.h"
#include "gpu/kernels/mask_gradient.h"
#include "gpu/kernels/query_gradient.h"

namespace attention_ext {
namespace {

template <class Kernel>
void add_kernel(KernelPlan& plan, const typename Kernel::Problem& p) {
  add_launch<Kernel>(plan, Kernel::blocks(p));
}

template <class C, int kDim, ScoreMode kMode>
void add_delta(KernelPlan& plan, const BackwardProblem& p) {
  if constexpr (sizeof(typename C::Element) == 2) {  // of other dtypes delta is always exact
    if (needs_exact_delta(p)) {
      return add_kernel<QueryGradient<C, kDim, kMode, Order::kFirst, QueryResult::kDelta>>(plan, p);
    }
  }
  add_kernel<Delta<C>>(plan, p);
}

template <class C, int kDim, ScoreMode kMode, Order kOrder>
void add_gradients(KernelPlan& plan, const ProblemOf<kOrder>& p) {
  using Queries = QueryGradient<C, kDim, kMode, kOrder>;
  set_workspace(plan, BackwardMemory<typename C::Scalar>::bytes(p, Queries::tiles(p), Queries::parts(p)));
  if (p.grad_query || p.grad_alibi_slopes) add_kernel<Queries>(plan, p);
  if constexpr (kOrder == Order::kFirst) {
    if (p.grad_query && Queries::parts(p) > 1) add_kernel<SumQueryParts<C, Queries>>(plan, p);
  }
  if constexpr (GradientShape<C, kDim, kOrder>::kBothGradients) {
    if (p.grad_key || p.grad_value) add_kernel<KeyGradient<C, kDim, kMode, kOrder, KeyResult::kBoth>>(plan, p);
  } else {
    if (p.grad_key) add_kernel<KeyGradient<C, kDim, kMode, kOrder, KeyResult::kKey>>(plan, p);
    if (p.grad_value) add_kernel<KeyGradient<C, kDim, kMode, kOrder, KeyResult::kValue>>(plan, p);
  }
  if constexpr (kMode == ScoreMode::kAll) {
    if (p.grad_attn_mask) add_kernel<MaskGradient<C, kDim, kOrder>>(plan, p);
  }
  if (p.grad_alibi_slopes || p.grad_sinks) add_kernel<HeadGradient<C, kOrder, Queries::kQueries>>(plan, p);
}

template <class C>
KernelPlan plan_delta_by_shape(const AttentionProblem& problem) {
  return with_shape<FirstOrderDims<C>>(problem, [&](auto dim, auto mode) {
    KernelPlan plan;
    add_delta<C, dim, mode>(plan, static_cast<const BackwardProblem&>(problem));
    return plan;
  });
}

template <class C>
KernelPlan plan_backward_by_shape(const AttentionProblem& problem) {
  const auto& p = static_cast<const BackwardProblem&>(problem);
  return with_shape<FirstOrderDims<C>>(p, [&](auto dim, auto mode) {
    KernelPlan plan;
    add_delta<C, dim, mode>(plan, p);
    add_gradients<C, dim, mode, Order::kFirst>(plan, p);
    return plan;
  });
}

}  // namespace
}  // namespace attention_ext
