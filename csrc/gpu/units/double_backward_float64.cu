#include "gpu/kernels/double_backward.h"
#include "gpu/unit.h"

template <>
attention_ext::KernelPlan attention_ext::plan_double_backward<attention_ext::KernelPlan, double>(
    const AttentionProblem& problem) {
  return plan_double_backward_by_shape<ComputeDouble>(problem);
}
