#include "gpu/kernels/backward.h"
#include "gpu/unit.h"

namespace attention_ext {

template <>
KernelPlan plan_delta<KernelPlan, float>(const AttentionProblem& p) {
  return plan_delta_by_shape<ComputeFloat>(p);
}

template <>
KernelPlan plan_backward<KernelPlan, float>(const AttentionProblem& p) {
  return plan_backward_by_shape<ComputeFloat>(p);
}

}  // namespace attention_ext
