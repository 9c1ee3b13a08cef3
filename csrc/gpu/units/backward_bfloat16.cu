#include "gpu/kernels/backward.h"
#include "gpu/unit.h"

namespace attention_ext {

template <>
KernelPlan plan_delta<KernelPlan, BFloat16>(const AttentionProblem& p) {
  return plan_delta_by_shape<Compute16<BFloat16>>(p);
}

template <>
KernelPlan plan_backward<KernelPlan, BFloat16>(const AttentionProblem& p) {
  return plan_backward_by_shape<Compute16<BFloat16>>(p);
}

}  // namespace attention_ext
