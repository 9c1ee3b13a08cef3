// Forward mode: the tangent and the primal of a dual tensor.
#pragma once

#include "torch/ops.h"

namespace attention_ext {

// Undefined or absent where there is none.
at::Tensor tangent_of(const at::Tensor& tensor);
at::Tensor tangent_of(const std::optional<at::Tensor>& tensor);
ops::InputTangents tangents_of(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const AttentionOptions& options);
ops::InputTangents tangents_of(const ops::InputTangents& tangents);

bool any_tangent(const ops::InputTangents& tangents);

at::Tensor primal(const at::Tensor& tensor);
std::optional<at::Tensor> primal(const std::optional<at::Tensor>& tensor);
AttentionOptions primal(AttentionOptions options);
ops::InputTangents primal(const ops::InputTangents& tangents);

}  // namespace attention_ext
