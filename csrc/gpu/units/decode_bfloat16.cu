#include "gpu/kernels/decode.h"
#include "gpu/unit.h"

template <>
attention_ext::KernelPlan attention_ext::plan_decode<attention_ext::KernelPlan, attention_ext::BFloat16>(
    const AttentionProblem& problem) {
  return plan_decode_by_shape<Compute16<BFloat16>>(problem);
}
