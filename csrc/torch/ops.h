// The operators as C++ functions. Each call goes through the dispatcher, so it gets the autograd, vmap, autocast and
// tracing of whoever calls; a backend's kernel of an operator has the same type as its function here.
#pragma once

#include <array>

#include "attention_ext/options.h"

namespace attention_ext::ops {

using at::Tensor;

using Forward = std::tuple<Tensor, Tensor, Tensor>;                            // out, logsumexp, rng_state
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // of the six differentiable inputs
using OutputMask = std::array<bool, 6>;  // query, key, value, attn_mask, alibi_slopes, sinks: which gradients to make

Forward attention(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options);

Gradients attention_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_logsumexp, const Tensor& query,
                             const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& logsumexp,
                             const Tensor& rng_state, const AttentionOptions& options, OutputMask output_mask);

// row_begin and row_end: the queries whose weights are made, all if absent.
Tensor attention_weights(const Tensor& query, const Tensor& key, const Tensor& logsumexp, const Tensor& rng_state,
                         const AttentionOptions& options, bool average_heads, std::optional<c10::SymInt> row_begin,
                         std::optional<c10::SymInt> row_end);

// Which kernel of a pass ("forward", "backward", "weights") serves such a call, and why the others do not.
std::string attention_explain(const Tensor& query, const Tensor& key, const Tensor& value,
                              const AttentionOptions& options, std::string_view which);

}  // namespace attention_ext::ops
