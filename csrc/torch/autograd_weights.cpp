// The autograd kernel of attention_weights_forward, whose derivatives are composed.
#include <torch/library.h>

#include "torch/autograd_node.h"
#include "torch/tangents.h"
#include "torch/weights_derivative.h"

namespace attention_ext {

namespace {

using at::Tensor;

// with respect to query, key, logsumexp, attn_mask, alibi_slopes; sinks are in logsumexp already
struct WeightsRule {
  static constexpr const char* kName = "AttentionExtAttentionWeightsBackward";

  static variable_list gradients(const Request& request, const Tensor& query, const Tensor& key,
                                 const Tensor& logsumexp, const Tensor& rng_state, const AttentionOptions& options,
                                 bool average_heads, std::optional<c10::SymInt> row_begin,
                                 std::optional<c10::SymInt> row_end) {
    if (!request.grads[0].defined()) return variable_list(request.wanted.size());
    const WeightsCall call(query, key, logsumexp, rng_state, options, average_heads, row_begin, row_end);
    return weights_gradients(call, request.grads[0], request.wanted);
  }
};

Tensor attention_weights_forward_autograd(const Tensor& query, const Tensor& key, const Tensor& logsumexp,
                                          const Tensor& rng_state, const AttentionOptions& options, bool average_heads,
                                          std::optional<c10::SymInt> row_begin, std::optional<c10::SymInt> row_end) {
  Tensor weights = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return ops::attention_weights_forward(query, key, logsumexp, rng_state, options, average_heads, row_begin, row_end);
  }();
  const auto inputs = std::tie(query, key, logsumexp, options.attn_mask, options.alibi_slopes);
  if (any_requires_grad(inputs)) {
    record<WeightsRule>({weights}, edges_of(inputs), query, key, logsumexp, rng_state, options, average_heads,
                        row_begin, row_end);
  }
  auto tangents = tangents_of(query, key, Tensor(), options);
  tangents.sinks = std::nullopt;
  const Tensor logsumexp_tangent = tangent_of(logsumexp);
  if (any_tangent(tangents) || logsumexp_tangent.defined()) {
    const WeightsCall call(primal(query), primal(key), primal(logsumexp), rng_state, primal(options), average_heads,
                           row_begin, row_end);
    set_tangent(weights, weights_tangent(call, tangents, logsumexp_tangent));
  }
  return weights;
}

TORCH_LIBRARY_IMPL(attention_ext, Autograd, m) {
  m.impl("attention_weights_forward", flat_kernel<attention_weights_forward_autograd>);
}

}  // namespace

}  // namespace attention_ext
