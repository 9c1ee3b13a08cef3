#include "gpu/kernels/forward.h"
#include "gpu/unit.h"

template <>
attention_ext::KernelPlan attention_ext::plan_forward<attention_ext::KernelPlan, attention_ext::Half>(
    const AttentionProblem& problem) {
  return plan_forward_by_shape<Compute16<Half>>(problem);
}
