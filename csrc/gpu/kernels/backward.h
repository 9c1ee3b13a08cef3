// Gradients of every input from grad_out and grad_logsumexp, each in one place and in a fixed order:
//   delta    rowsum(grad_out * out) - grad_logsumexp
//   queries  grad_query, walking keys      keys   grad_key and grad_value, walking queries
//   mask     grad_attn_mask                heads  gradients of slopes and sinks
#pragma once

#include "core/delta.h"
#include "gpu/kernels/head_gradient.h"
#include "gpu/kernels/key_gradient.h"
#include "gpu/kernels/mask_gradient.h"
#include "gpu/kernels/query_gradient.h"

namespace attention_ext {
namespace {

template <class Kernel>
void add_kernel(KernelPlan& plan, const BackwardProblem& p) {
  add_launch<Kernel>(plan, Kernel::blocks(p));
}

template <class C, int kDim, Rules kRules>
void add_key_gradients(KernelPlan& plan, const BackwardProblem& p) {
  if constexpr (BackwardShape<C, kDim>::kBothGradients) {
    if (p.grad_key || p.grad_value) add_kernel<KeyGradient<C, kDim, kRules, KeyResult::kBoth>>(plan, p);
  } else {
    if (p.grad_key) add_kernel<KeyGradient<C, kDim, kRules, KeyResult::kKey>>(plan, p);
    if (p.grad_value) add_kernel<KeyGradient<C, kDim, kRules, KeyResult::kValue>>(plan, p);
  }
}

template <class C>
KernelPlan plan_backward_by_shape(const AttentionProblem& problem) {
  const auto& p = static_cast<const BackwardProblem&>(problem);
  return with_shape(p, [&](auto dim, auto rules) {
    using Queries = QueryGradient<C, dim, rules, QueryResult::kGradient>;
    KernelPlan plan;
    set_workspace(plan, BackwardMemory<typename C::Scalar>::bytes(p, Queries::blocks(p)));
    if (needs_exact_delta(p)) {
      add_kernel<QueryGradient<C, dim, rules, QueryResult::kDelta>>(plan, p);
    } else {
      add_kernel<Delta<C>>(plan, p);
    }
    if (p.grad_query || p.grad_alibi_slopes) add_kernel<Queries>(plan, p);
    add_key_gradients<C, dim, rules>(plan, p);
    if constexpr (rules == Rules::kAll) {
      if (p.grad_attn_mask) add_kernel<MaskGradient<C, dim, rules>>(plan, p);
    }
    if (p.grad_alibi_slopes || p.grad_sinks) add_kernel<HeadGradient<C, Queries::kQueries>>(plan, p);
    return plan;
  });
}

}  // namespace
}  // namespace attention_ext
