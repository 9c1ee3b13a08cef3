// Gradients and tangents of the differentiable inputs, between the operators' tuples and autograd's lists.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "torch/autograd_node.h"
#include "torch/ops.h"

namespace attention_ext {

inline at::Tensor sum_of(const at::Tensor& a, const at::Tensor& b) {
  return !a.defined() ? b : !b.defined() ? a : a + b;
}

inline std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

inline at::Tensor or_zeros(const at::Tensor& tensor, const at::Tensor& like) {
  return tensor.defined() ? tensor : at::zeros_like(like);
}

// The flags of the differentiable inputs, which begin at `first`.
inline ops::OutputMask input_mask(const std::vector<bool>& wanted, size_t first) {
  ops::OutputMask mask;
  std::copy_n(wanted.begin() + static_cast<std::ptrdiff_t>(first), mask.size(), mask.begin());
  return mask;
}

// The gradients of attention_backward's results, which begin at `first`, as tangents of the inputs.
inline ops::InputTangents tangents_from(const variable_list& grads, size_t first) {
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return ops::InputTangents{if_defined(grads[first + i])...};
  }(std::make_index_sequence<ops::kInputs>());
}

inline bool wants_any(const ops::OutputMask& mask) { return std::find(mask.begin(), mask.end(), true) != mask.end(); }

// The gradients of the inputs, the last of an operator's outputs; undefined where not wanted.
template <class Outputs>
variable_list gradients_of(const Outputs& outputs, const ops::OutputMask& wanted) {
  constexpr size_t kFirst = std::tuple_size_v<Outputs> - ops::kInputs;
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return variable_list{(wanted[i] ? std::get<kFirst + i>(outputs) : at::Tensor())...};
  }(std::make_index_sequence<ops::kInputs>());
}

}  // namespace attention_ext
