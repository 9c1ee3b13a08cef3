// The derivative chain: each operator's kernel for the Autograd key. It calls the operator below autograd, then gives the
// outputs their history. A tangent or a graph that nothing here can carry on raises; it is never dropped.
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include "torch/autograd_node.h"
#include "torch/ops.h"
#include "torch/weights_derivative.h"

namespace attention_ext {

namespace {

using at::Tensor;
using torch::autograd::collect_next_edges;
using torch::autograd::compute_requires_grad;
using torch::autograd::isFwGradDefined;

template <class... Argument>
void refuse_tangents(const char* op, const Argument&... argument) {
  TORCH_CHECK_NOT_IMPLEMENTED((!isFwGradDefined(argument) && ...), op,
                              ": forward-mode derivatives (jvp, jacfwd, dual numbers) are not implemented");
}

// out and logsumexp of attention, with respect to query, key, value, attn_mask, alibi_slopes, sinks
struct AttentionRule {
  static constexpr const char* name = "AttentionExtAttentionBackward";

  static variable_list gradients(const Request& request, const Tensor& query, const Tensor& key, const Tensor& value,
                                 const Tensor& out, const Tensor& logsumexp, const Tensor& rng_state,
                                 const AttentionOptions& options) {
    const auto& grad_out = request.grads[0];
    const auto& grad_logsumexp = request.grads[1];
    if (!grad_out.defined() && !grad_logsumexp.defined()) return variable_list(6);
    ops::OutputMask wanted;
    std::copy(request.wanted.begin(), request.wanted.end(), wanted.begin());
    auto gradients = ops::attention_backward(
        grad_out.defined() ? grad_out : at::zeros_like(out),
        grad_logsumexp.defined() ? std::optional<Tensor>(grad_logsumexp) : std::nullopt, query, key, value, out,
        logsumexp, rng_state, options, wanted);
    return std::apply(
        [&](auto&... gradient) {
          size_t i = 0;
          return variable_list{(wanted[i++] ? gradient : Tensor())...};
        },
        gradients);
  }
};

ops::Forward attention_autograd(const Tensor& query, const Tensor& key, const Tensor& value,
                                const AttentionOptions& options) {
  const auto& [mask, slopes, sinks] = std::tie(options.attn_mask, options.alibi_slopes, options.sinks);
  refuse_tangents("attention", query, key, value, mask, slopes, sinks);
  auto outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return ops::attention(query, key, value, options);
  }();
  if (compute_requires_grad(query, key, value, mask, slopes, sinks)) {
    const auto& [out, logsumexp, rng_state] = outputs;
    record<AttentionRule>({out, logsumexp}, collect_next_edges(query, key, value, mask, slopes, sinks), query, key,
                          value, out, logsumexp, rng_state, options);
  }
  return outputs;
}

// out and logsumexp are taken for what attention makes of the other inputs: they are no inputs of their own.
ops::Gradients attention_backward_autograd(const Tensor& grad_out, const std::optional<Tensor>& grad_logsumexp,
                                           const Tensor& query, const Tensor& key, const Tensor& value,
                                           const Tensor& out, const Tensor& logsumexp, const Tensor& rng_state,
                                           const AttentionOptions& options, ops::OutputMask output_mask) {
  const auto& [mask, slopes, sinks] = std::tie(options.attn_mask, options.alibi_slopes, options.sinks);
  refuse_tangents("attention_backward", grad_out, grad_logsumexp, query, key, value, mask, slopes, sinks);
  auto gradients = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return ops::attention_backward(grad_out, grad_logsumexp, query, key, value, out, logsumexp, rng_state, options,
                                   output_mask);
  }();
  if (compute_requires_grad(grad_out, grad_logsumexp, query, key, value, mask, slopes, sinks)) {
    const auto error = make_node<torch::autograd::Error>(
        "attention_backward: second derivatives are not implemented",
        collect_next_edges(grad_out, grad_logsumexp, query, key, value, mask, slopes, sinks));
    std::apply([&](const auto&... gradient) { (torch::autograd::set_history(gradient, error), ...); }, gradients);
  }
  return gradients;
}

// with respect to query, key, logsumexp, attn_mask, alibi_slopes; sinks are in logsumexp already
struct WeightsRule {
  static constexpr const char* name = "AttentionExtAttentionWeightsBackward";

  static variable_list gradients(const Request& request, const Tensor& query, const Tensor& key,
                                 const Tensor& logsumexp, const Tensor& rng_state, const AttentionOptions& options,
                                 bool average_heads, std::optional<c10::SymInt> row_begin,
                                 std::optional<c10::SymInt> row_end) {
    if (!request.grads[0].defined()) return variable_list(5);
    const WeightsCall call(query, key, logsumexp, rng_state, options, average_heads, row_begin, row_end);
    return weights_gradients(call, request.grads[0], request.wanted);
  }
};

Tensor attention_weights_autograd(const Tensor& query, const Tensor& key, const Tensor& logsumexp,
                                  const Tensor& rng_state, const AttentionOptions& options, bool average_heads,
                                  std::optional<c10::SymInt> row_begin, std::optional<c10::SymInt> row_end) {
  const auto& [mask, slopes] = std::tie(options.attn_mask, options.alibi_slopes);
  Tensor weights = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return ops::attention_weights(query, key, logsumexp, rng_state, options, average_heads, row_begin, row_end);
  }();
  if (compute_requires_grad(query, key, logsumexp, mask, slopes)) {
    record<WeightsRule>({weights}, collect_next_edges(query, key, logsumexp, mask, slopes), query, key, logsumexp,
                        rng_state, options, average_heads, row_begin, row_end);
  }
  const WeightsTangents tangents(query, key, logsumexp, options);
  if (tangents.any()) {
    const WeightsCall call(primal(query), primal(key), primal(logsumexp), rng_state, primal(options), average_heads,
                           row_begin, row_end);
    weights._set_fw_grad(weights_tangent(call, tangents), /*level=*/0, /*is_inplace_op=*/false);
  }
  return weights;
}

TORCH_LIBRARY_IMPL(attention_ext, Autograd, m) {
  m.impl("attention", flat_kernel<attention_autograd>);
  m.impl("attention_backward", flat_kernel<attention_backward_autograd>);
  m.impl("attention_weights", flat_kernel<attention_weights_autograd>);
}

}  // namespace

}  // namespace attention_ext
