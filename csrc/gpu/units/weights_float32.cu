#include "gpu/kernels/weights.h"
#include "gpu/unit.h"

template <>
attention_ext::KernelPlan attention_ext::plan_weights<attention_ext::KernelPlan, float>(
    const AttentionProblem& problem) {
  return plan_weights_by_shape<ComputeFloat>(problem);
}
