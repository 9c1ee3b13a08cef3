// The gradients of attention_backward's results, each times a tangent: how out, logsumexp and the first gradients move.
#pragma once

#include "gpu/kernels/backward.h"
#include "gpu/kernels/jvp.h"

namespace attention_ext {
namespace {

template <class C>
KernelPlan plan_double_backward_by_shape(const AttentionProblem& problem) {
  const auto& p = static_cast<const DoubleBackwardProblem&>(problem);
  return with_shape<kMostMovingDim<C>>(p, [&](auto dim, auto rules) {
    KernelPlan plan;
    add_delta<C, dim, rules>(plan, p);
    add_kernel<Jvp<C, dim, rules, DoubleBackwardProblem>>(plan, p);
    add_gradients<C, dim, rules, Order::kSecond>(plan, p);
    return plan;
  });
}

}  // namespace
}  // namespace attention_ext
