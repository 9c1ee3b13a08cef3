#include "gpu/kernels/jvp.h"
#include "gpu/unit.h"

template <>
attention_ext::KernelPlan attention_ext::plan_jvp<attention_ext::KernelPlan, float>(const AttentionProblem& problem) {
  return plan_jvp_by_shape<ComputeFloat>(problem);
}
