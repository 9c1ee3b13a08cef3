#include "gpu/kernels/backward.h"
#include "gpu/unit.h"

template <>
attention_ext::KernelPlan attention_ext::plan_backward<attention_ext::KernelPlan, double>(
    const AttentionProblem& problem) {
  return plan_backward_by_shape<ComputeDouble>(problem);
}
