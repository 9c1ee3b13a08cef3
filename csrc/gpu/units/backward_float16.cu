#include "gpu/kernels/backward.h"
#include "gpu/unit.h"

namespace attention_ext {

template <>
KernelPlan plan_delta<KernelPlan, Half>(const AttentionProblem& p) {
  return plan_delta_by_shape<Compute16<Half>>(p);
}

template <>
KernelPlan plan_backward<KernelPlan, Half>(const AttentionProblem& p) {
  return plan_backward_by_shape<Compute16<Half>>(p);
}

}  // namespace attention_ext
