// attention_jvp out of differentiable torch operators, for forward mode over forward mode: a second derivative along
// two directions, which none of the kernels makes. Memory is that of the weights.
#pragma once

#include "torch/ops.h"

namespace attention_ext {

// out and logsumexp are inputs of their own here: their tangents and histories count.
ops::OutputTangents composed_jvp(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const at::Tensor& out, const at::Tensor& logsumexp, const at::Tensor& rng_state,
                                 const ops::InputTangents& tangents, const AttentionOptions& options);

}  // namespace attention_ext
