#include "torch/logsumexp_low.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>

#include "torch/device.h"

namespace attention_ext {

namespace {

using at::Tensor;

template <class T>
bool is_far_anywhere(const T* logsumexp, int64_t count) {
  bool far = false;
  for (int64_t i = 0; i < count; ++i) {
    const T distance = std::abs(logsumexp[i]);
    far |= distance > T(kFarFromZero) && distance < std::numeric_limits<T>::infinity();
  }
  return far;
}

bool is_far_anywhere(const Tensor& logsumexp) {
  const Tensor rows = logsumexp.contiguous();
  return rows.scalar_type() == at::kDouble ? is_far_anywhere(rows.const_data_ptr<double>(), rows.numel())
                                           : is_far_anywhere(rows.const_data_ptr<float>(), rows.numel());
}

}  // namespace

void* logsumexp_low(const AttentionProblem& call, const Tensor& logsumexp, Converted& converted) {
  if (!logsumexp.is_cpu() || !is_far_anywhere(logsumexp)) return nullptr;
  ForwardProblem problem;
  static_cast<AttentionProblem&>(problem) = call;
  problem.value = call.key;
  problem.head_dim_v = 0;
  problem.dropout_p = 0;
  const Tensor again = at::empty(logsumexp.sizes(), logsumexp.options());
  const Tensor rest = at::zeros(logsumexp.sizes(), logsumexp.options());
  problem.logsumexp = again.mutable_data_ptr();
  problem.logsumexp_low = rest.mutable_data_ptr();  // stays 0 where a GPU's kernel, emulated, is forced
  device_for(at::kCPU).run(Pass::kForward, problem);
  // Of rows near 0 nothing, whatever others in the call hold: a row's results are its own.
  const Tensor far = logsumexp.abs().gt(kFarFromZero).logical_and(logsumexp.isfinite());
  return converted.emplace_back(at::where(far, rest + (again - logsumexp), 0)).mutable_data_ptr();
}

}  // namespace attention_ext
