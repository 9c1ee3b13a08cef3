#include "torch/tangents.h"

#include <torch/csrc/autograd/functions/utils.h>

namespace attention_ext {

using at::Tensor;

Tensor tangent_of(const Tensor& tensor) { return tensor.defined() ? tensor._fw_grad(/*level=*/0) : Tensor(); }

Tensor tangent_of(const std::optional<Tensor>& tensor) { return tangent_of(tensor.value_or(Tensor())); }

namespace {

template <class... Input>
ops::InputTangents all_tangents_of(const Input&... input) {
  const auto of = [](const auto& tensor) {
    Tensor tangent = tangent_of(tensor);
    return tangent.defined() ? std::optional<Tensor>(std::move(tangent)) : std::nullopt;
  };
  return {of(input)...};
}

}  // namespace

ops::InputTangents tangents_of(const Tensor& query, const Tensor& key, const Tensor& value,
                               const AttentionOptions& options) {
  return std::apply([](const auto&... input) { return all_tangents_of(input...); },
                    ops::differentiable(query, key, value, options));
}

ops::InputTangents tangents_of(const ops::InputTangents& tangents) {
  return std::apply([](const auto&... tangent) { return all_tangents_of(tangent...); }, tangents.fields());
}

bool any_tangent(const ops::InputTangents& tangents) {
  return std::apply([](const auto&... tangent) { return (tangent.has_value() || ...); }, tangents.fields());
}

Tensor primal(const Tensor& tensor) {
  return torch::autograd::isFwGradDefined(tensor) ? tensor._fw_primal(/*level=*/0) : tensor;
}

std::optional<Tensor> primal(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(primal(*tensor)) : tensor;
}

AttentionOptions primal(AttentionOptions options) {
  std::apply([](auto&... input) { ((input = primal(input)), ...); }, options.differentiable());
  return options;
}

ops::InputTangents primal(const ops::InputTangents& tangents) {
  return std::apply([](const auto&... tangent) { return ops::InputTangents{primal(tangent)...}; }, tangents.fields());
}

}  // namespace attention_ext
