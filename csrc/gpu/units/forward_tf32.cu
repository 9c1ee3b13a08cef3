#include "gpu/kernels/forward.h"
#include "gpu/unit.h"

template <>
attention_ext::KernelPlan attention_ext::plan_forward<attention_ext::KernelPlan, attention_ext::Tf32>(
    const AttentionProblem& problem) {
  return plan_forward_by_shape<ComputeTf32>(problem);
}
