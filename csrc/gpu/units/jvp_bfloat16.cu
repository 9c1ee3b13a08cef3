#include "gpu/kernels/jvp.h"
#include "gpu/unit.h"

template <>
attention_ext::KernelPlan attention_ext::plan_jvp<attention_ext::KernelPlan, attention_ext::BFloat16>(
    const AttentionProblem& problem) {
  return plan_jvp_by_shape<Compute16<BFloat16>>(problem);
}
