// The gradients of attention_backward's results, each times a tangent: how out, logsumexp and the first gradients move.
#pragma once

#include "gpu/kernels/backward.h"
#include "gpu/kernels/jvp.h"
#include "gpu/unit.h"

namespace attention_ext {
namespace {

// The launches of delta and of the jvp are compiled in their own units.
template <class C>
KernelPlan plan_double_backward_by_shape(const AttentionProblem& problem) {
  const auto& p = static_cast<const DoubleBackwardProblem&>(problem);
  return with_shape<SecondOrderDims<C>>(p, [&](auto dim, auto mode) {
    auto plan = plan_delta<KernelPlan, typename C::Element>(p);
    add_launches(plan, plan_jvp<KernelPlan, typename C::Element>(p));
    add_gradients<C, dim, mode, Order::kSecond>(plan, p);
    return plan;
  });
}

}  // namespace
}  // namespace attention_ext
