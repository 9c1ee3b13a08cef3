#include "gpu/kernels/backward.h"
#include "gpu/unit.h"

template <>
attention_ext::KernelPlan attention_ext::plan_backward<attention_ext::KernelPlan, attention_ext::Tf32>(
    const AttentionProblem& problem) {
  return plan_backward_by_shape<ComputeTf32>(problem);
}
