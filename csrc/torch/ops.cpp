#include "torch/ops.h"

namespace attention_ext::ops {

Forward attention_forward(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options,
                          const std::optional<Tensor>& rng_state) {
  static const Operator<decltype(attention_forward)> op("attention_ext::attention_forward");
  return op(query, key, value, options, rng_state);
}

Gradients attention_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_logsumexp, const Tensor& query,
                             const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& logsumexp,
                             const Tensor& rng_state, const AttentionOptions& options, OutputMask output_mask) {
  static const Operator<decltype(attention_backward)> op("attention_ext::attention_backward");
  return op(grad_out, grad_logsumexp, query, key, value, out, logsumexp, rng_state, options, output_mask);
}

Tensor attention_weights_forward(const Tensor& query, const Tensor& key, const Tensor& logsumexp,
                                 const Tensor& rng_state, const AttentionOptions& options, bool average_heads,
                                 std::optional<c10::SymInt> row_begin, std::optional<c10::SymInt> row_end) {
  static const Operator<decltype(attention_weights_forward)> op("attention_ext::attention_weights_forward");
  return op(query, key, logsumexp, rng_state, options, average_heads, row_begin, row_end);
}

OutputTangents attention_jvp(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                             const Tensor& logsumexp, const Tensor& rng_state, const InputTangents& tangents,
                             const AttentionOptions& options) {
  static const Operator<decltype(attention_jvp)> op("attention_ext::attention_jvp");
  return op(query, key, value, out, logsumexp, rng_state, tangents, options);
}

SecondOrder attention_double_backward(const InputTangents& tangents, const Tensor& grad_out,
                                      const std::optional<Tensor>& grad_logsumexp, const Tensor& query,
                                      const Tensor& key, const Tensor& value, const Tensor& out,
                                      const Tensor& logsumexp, const Tensor& rng_state, const AttentionOptions& options,
                                      OutputMask output_mask, bool compute_out_tangent) {
  static const Operator<decltype(attention_double_backward)> op("attention_ext::attention_double_backward");
  return op(tangents, grad_out, grad_logsumexp, query, key, value, out, logsumexp, rng_state, options, output_mask,
            compute_out_tangent);
}

}  // namespace attention_ext::ops
