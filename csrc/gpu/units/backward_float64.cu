#include "gpu/kernels/backward.h"
#include "gpu/unit.h"

namespace attention_ext {

template <>
KernelPlan plan_delta<KernelPlan, double>(const AttentionProblem& p) {
  return plan_delta_by_shape<ComputeDouble>(p);
}

template <>
KernelPlan plan_backward<KernelPlan, double>(const AttentionProblem& p) {
  return plan_backward_by_shape<ComputeDouble>(p);
}

}  // namespace attention_ext
