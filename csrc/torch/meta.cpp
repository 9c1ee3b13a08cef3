// The operators on tensors without values: the same checks and the same outputs as on a device. Fake tensors, also
// those with symbolic sizes, come here too.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "torch/outputs.h"

namespace attention_ext {

namespace {

using at::Tensor;

ops::Forward attention_forward_meta(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const AttentionOptions& options, const std::optional<Tensor>& rng_state) {
  const char* op = "attention";
  const Sizes sizes = check_forward(op, query, key, value, options, rng_state);
  return empty_forward(
      query, sizes, rng_state && options.dropout_p > 0 ? at::empty_like(*rng_state) : empty_rng_state(query, options));
}

ops::Gradients empty_gradients(const Tensor& query, const Tensor& key, const Tensor& value,
                               const AttentionOptions& options, const ops::OutputMask& output_mask) {
  const auto wanted = existing_gradients(options, output_mask);
  size_t i = 0;
  const auto like = [&](const std::optional<Tensor>& input) {
    const size_t index = i++;
    if (!wanted[index]) return not_made(query);
    if (index >= ops::kAttnMask) return at::empty_symint(input->sym_sizes(), input->options());
    return empty_heads(*input, input->sym_size(0), input->sym_size(1), input->sym_size(2), input->sym_size(3));
  };
  return std::apply([&](const auto&... input) { return ops::Gradients{like(input)...}; },  // braces: in their order
                    ops::differentiable(query, key, value, options));
}

ops::Gradients attention_backward_meta(const Tensor& grad_out, const std::optional<Tensor>& grad_logsumexp,
                                       const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                                       const Tensor& logsumexp, const Tensor& rng_state,
                                       const AttentionOptions& options, ops::OutputMask output_mask) {
  const char* op = "attention_backward";
  check_backward(op, grad_out, grad_logsumexp, query, key, value, out, logsumexp, rng_state, options);
  return empty_gradients(query, key, value, options, output_mask);
}

ops::OutputTangents attention_jvp_meta(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                                       const Tensor& logsumexp, const Tensor& rng_state,
                                       const ops::InputTangents& tangents, const AttentionOptions& options) {
  const char* op = "attention_jvp";
  const Sizes sizes = check_jvp(op, query, key, value, out, logsumexp, rng_state, tangents, options);
  return empty_tangents(query, sizes);
}

ops::SecondOrder attention_double_backward_meta(const ops::InputTangents& tangents, const Tensor& grad_out,
                                                const std::optional<Tensor>& grad_logsumexp, const Tensor& query,
                                                const Tensor& key, const Tensor& value, const Tensor& out,
                                                const Tensor& logsumexp, const Tensor& rng_state,
                                                const AttentionOptions& options, ops::OutputMask output_mask,
                                                bool compute_out_tangent) {
  const char* op = "attention_double_backward";
  const Sizes sizes = check_double_backward(op, tangents, grad_out, grad_logsumexp, query, key, value, out, logsumexp,
                                            rng_state, options);
  return std::tuple_cat(empty_tangents(query, sizes, compute_out_tangent),
                        empty_gradients(query, key, value, options, output_mask));
}

Tensor attention_weights_forward_meta(const Tensor& query, const Tensor& key, const Tensor& logsumexp,
                                      const Tensor& rng_state, const AttentionOptions& options, bool average_heads,
                                      std::optional<c10::SymInt> row_begin, std::optional<c10::SymInt> row_end) {
  const char* op = "attention_weights";
  const Sizes sizes = check_attention(op, query, key, nullptr, options);
  const Rows rows = check_weights(op, sizes, query, logsumexp, rng_state, options, row_begin, row_end);
  return empty_weights(query, sizes, average_heads, rows);
}

TORCH_LIBRARY_IMPL(attention_ext, Meta, m) {
  m.impl("attention_forward", flat_kernel<attention_forward_meta>);
  m.impl("attention_backward", flat_kernel<attention_backward_meta>);
  m.impl("attention_jvp", flat_kernel<attention_jvp_meta>);
  m.impl("attention_double_backward", flat_kernel<attention_double_backward_meta>);
  m.impl("attention_weights_forward", flat_kernel<attention_weights_forward_meta>);
}

}  // namespace

}  // namespace attention_ext
