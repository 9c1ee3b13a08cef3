// The launches of each pass for calls that the tiled kernels do not serve: any head_dim, every dtype and mod.
#pragma once

#include "gpu/kernels/simt/forward.h"
#include "gpu/kernels/simt/gradient.h"
#include "gpu/kernels/simt/jvp.h"
#include "gpu/kernels/simt/mask_gradient.h"
#include "gpu/kernels/simt/weights.h"

namespace attention_ext {
namespace {
namespace simt {

// Calls f with a number of the type that sums are made in.
template <class F>
KernelPlan with_scalar(const AttentionProblem& p, F&& f) {
  return p.dtype == DType::kFloat64 ? f(double{}) : f(float{});
}

template <class Kernel>
void add_kernel(KernelPlan& plan, const typename Kernel::Problem& p) {
  add_launch<Kernel>(plan, Kernel::blocks(p));
}

template <class Kernel>
KernelPlan plan_kernel(const AttentionProblem& p) {
  KernelPlan plan;
  add_kernel<Kernel>(plan, static_cast<const typename Kernel::Problem&>(p));
  return plan;
}

template <class T, Order kOrder>
void add_gradients(KernelPlan& plan, const ProblemOf<kOrder>& p) {
  using Queries = QueryGradient<T, kOrder>;
  using C = std::conditional_t<std::is_same_v<T, double>, ComputeDouble, ComputeFloat>;
  set_workspace(plan, BackwardMemory<T>::bytes(p, Queries::blocks(p)));
  if (p.grad_query || p.grad_alibi_slopes) add_kernel<Queries>(plan, p);
  if (p.grad_key || p.grad_value) add_kernel<KeyGradient<T, kOrder>>(plan, p);
  if (p.grad_attn_mask) add_kernel<MaskGradient<T, kOrder>>(plan, p);
  if (p.grad_alibi_slopes || p.grad_sinks) add_kernel<HeadGradient<C, kOrder, kWarps>>(plan, p);
}

template <class T>
KernelPlan plan_backward(const BackwardProblem& p) {
  KernelPlan plan;
  add_kernel<Delta<T>>(plan, p);
  add_gradients<T, Order::kFirst>(plan, p);
  return plan;
}

template <class T>
KernelPlan plan_double_backward(const DoubleBackwardProblem& p) {
  KernelPlan plan;
  add_kernel<Delta<T>>(plan, p);
  add_kernel<Jvp<T>>(plan, p);
  add_gradients<T, Order::kSecond>(plan, p);
  return plan;
}

}  // namespace simt
}  // namespace
}  // namespace attention_ext
