#include "gpu/kernels/decode.h"
#include "gpu/unit.h"

template <>
attention_ext::KernelPlan attention_ext::plan_decode<attention_ext::KernelPlan, float>(
    const AttentionProblem& problem) {
  return plan_decode_by_shape<ComputeFloat>(problem);
}
