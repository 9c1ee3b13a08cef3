// The operators as C++ functions. Each call goes through the dispatcher, so it gets the autograd, vmap, autocast and
// tracing of whoever calls; a backend's kernel of an operator has the same type as its function here.
#pragma once

#include <array>

#include "attention_ext/flat.h"
#include "attention_ext/options.h"

namespace attention_ext::ops {

using at::Tensor;

using Forward = std::tuple<Tensor, Tensor, Tensor>;                            // out, logsumexp, rng_state
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // of the six differentiable inputs
// The differentiable inputs, in the order of tangents, gradients and output_mask.
enum Input : size_t { kQuery, kKey, kValue, kAttnMask, kAlibiSlopes, kSinks, kInputs };

using OutputMask = std::array<bool, kInputs>;  // which gradients to compute

inline auto differentiable(const Tensor& query, const Tensor& key, const Tensor& value,
                           const AttentionOptions& options) {
  return std::tuple_cat(std::tie(query, key, value), options.differentiable());
}

Forward attention_forward(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options,
                          const std::optional<Tensor>& rng_state);

Gradients attention_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_logsumexp, const Tensor& query,
                             const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& logsumexp,
                             const Tensor& rng_state, const AttentionOptions& options, OutputMask output_mask);

// row_begin and row_end: the queries whose weights are made, all if absent.
Tensor attention_weights_forward(const Tensor& query, const Tensor& key, const Tensor& logsumexp,
                                 const Tensor& rng_state, const AttentionOptions& options, bool average_heads,
                                 std::optional<c10::SymInt> row_begin, std::optional<c10::SymInt> row_end);

// Tangents of the differentiable inputs, each like its input; absent means a zero tangent.
struct InputTangents {
  std::optional<Tensor> query, key, value, attn_mask, alibi_slopes, sinks;

  auto fields() const { return std::tie(query, key, value, attn_mask, alibi_slopes, sinks); }
};

using OutputTangents = std::tuple<Tensor, Tensor>;  // of out, logsumexp

OutputTangents attention_jvp(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                             const Tensor& logsumexp, const Tensor& rng_state, const InputTangents& tangents,
                             const AttentionOptions& options);

using SecondOrder = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Tangents of all results along those of the inputs: of out and logsumexp, which are also the gradients of grad_out and
// grad_logsumexp where the tangents are gradients of attention_backward's results, then of the gradients. Without
// compute_out_tangent that of out is empty, and two of twelve products are saved.
SecondOrder attention_double_backward(const InputTangents& tangents, const Tensor& grad_out,
                                      const std::optional<Tensor>& grad_logsumexp, const Tensor& query,
                                      const Tensor& key, const Tensor& value, const Tensor& out,
                                      const Tensor& logsumexp, const Tensor& rng_state, const AttentionOptions& options,
                                      OutputMask output_mask, bool compute_out_tangent);

}  // namespace attention_ext::ops
