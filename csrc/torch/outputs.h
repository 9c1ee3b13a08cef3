// Outputs of the operators before they are computed: sizes, strides and dtypes, on any device, meta included.
#pragma once

#include "torch/checks.h"

namespace attention_ext {

// (B, H, L, D) over (B, L, H, D) memory, so that merging heads is free.
at::Tensor empty_heads(const at::Tensor& query, const c10::SymInt& batch, const c10::SymInt& heads,
                       const c10::SymInt& length, const c10::SymInt& head_dim);

at::Tensor empty_rng_state(const at::Tensor& query, const AttentionOptions& options);

ops::Forward empty_forward(const at::Tensor& query, const Sizes& sizes, const at::Tensor& rng_state);

ops::OutputTangents empty_tangents(const at::Tensor& query, const Sizes& sizes, bool compute_out_tangent = true);

// Which of the gradients asked for exist: a bool mask has none, nor has an absent input.
ops::OutputMask existing_gradients(const AttentionOptions& options, ops::OutputMask output_mask);

// The empty tensor that an operator returns for an output that was not asked for.
at::Tensor not_made(const at::Tensor& query);

at::Tensor empty_weights(const at::Tensor& query, const Sizes& sizes, bool average_heads, const Rows& rows);

}  // namespace attention_ext
