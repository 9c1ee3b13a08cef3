#include "gpu/kernels/simt/plan.h"
#include "gpu/unit.h"

namespace attention_ext {

template <>
KernelPlan plan_simt_forward<KernelPlan>(const AttentionProblem& p) {
  return simt::with_scalar(p, [&]<class T>(T) { return simt::plan_kernel<simt::Forward<T>>(p); });
}

template <>
KernelPlan plan_simt_backward<KernelPlan>(const AttentionProblem& p) {
  return simt::with_scalar(p,
                           [&]<class T>(T) { return simt::plan_backward<T>(static_cast<const BackwardProblem&>(p)); });
}

template <>
KernelPlan plan_simt_weights<KernelPlan>(const AttentionProblem& p) {
  return simt::with_scalar(p, [&]<class T>(T) { return simt::plan_kernel<simt::Weights<T>>(p); });
}

template <>
KernelPlan plan_simt_jvp<KernelPlan>(const AttentionProblem& p) {
  return simt::with_scalar(p, [&]<class T>(T) { return simt::plan_kernel<simt::Jvp<T>>(p); });
}

template <>
KernelPlan plan_simt_double_backward<KernelPlan>(const AttentionProblem& p) {
  return simt::with_scalar(
      p, [&]<class T>(T) { return simt::plan_double_backward<T>(static_cast<const DoubleBackwardProblem&>(p)); });
}

}  // namespace attention_ext
