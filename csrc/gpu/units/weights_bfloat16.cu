#include "gpu/kernels/weights.h"
#include "gpu/unit.h"

template <>
attention_ext::KernelPlan attention_ext::plan_weights<attention_ext::KernelPlan, attention_ext::BFloat16>(
    const AttentionProblem& problem) {
  return plan_weights_by_shape<Compute16<BFloat16>>(problem);
}
