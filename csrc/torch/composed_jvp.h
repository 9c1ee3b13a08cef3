// The derivative of attention_jvp's outputs along tangents of attention's inputs, for forward mode over forward mode: a
// second derivative along two directions, which none of the kernels makes. It is composed of differentiable torch
// operators; memory is that of the weights.
#pragma once

#include "torch/ops.h"

namespace attention_ext {

// first: the tangents that attention_jvp was called with; second: those of its inputs. Symmetric in the two.
ops::OutputTangents composed_jvp(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const at::Tensor& out, const at::Tensor& logsumexp, const at::Tensor& rng_state,
                                 const ops::InputTangents& first, const ops::InputTangents& second,
                                 const AttentionOptions& options);

}  // namespace attention_ext
