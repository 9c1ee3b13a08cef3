// The operators that users call: shapes as torch's own function takes them, on top of operators of one shape that have
// kernels, derivatives and rules for every subsystem. torch decomposes them wherever it needs to.
#include <torch/library.h>

#include <algorithm>

#include "torch/leading_dims.h"

namespace attention_ext {

namespace {

using at::Tensor;

ops::Forward attention(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options,
                       const std::optional<Tensor>& rng_state) {
  if (!needs_folding(query, key, value, options)) {
    return ops::attention_forward(query, key, value, options, rng_state);
  }
  const FoldedCall call("attention", query, key, value, options);
  const auto [out, logsumexp, used_state] =
      ops::attention_forward(call.query, call.key, call.value, call.options, rng_state);
  return {call.unfold(out, call.rank), call.unfold(logsumexp, call.rank - 1), used_state};
}

Tensor scaled_dot_product_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const std::optional<Tensor>& attn_mask, double dropout_p, bool is_causal,
                                    std::optional<double> scale, bool enable_gqa) {
  AttentionOptions options;
  options.attn_mask = attn_mask;
  options.dropout_p = dropout_p;
  options.is_causal = is_causal;
  options.scale = scale;
  options.enable_gqa = enable_gqa;
  return std::get<0>(attention(query, key, value, options, std::nullopt));
}

Tensor logsumexp_of(const Tensor& query, const Tensor& key, AttentionOptions options) {
  options.dropout_p = 0;
  return std::get<1>(attention(query, key, key.narrow(-1, 0, 0), options, std::nullopt));
}

Tensor attention_weights(const Tensor& query, const Tensor& key, const std::optional<Tensor>& given_logsumexp,
                         const std::optional<Tensor>& given_state, const AttentionOptions& options, bool average_heads,
                         std::optional<c10::SymInt> row_begin, std::optional<c10::SymInt> row_end) {
  const Tensor logsumexp = given_logsumexp ? *given_logsumexp : logsumexp_of(query, key, options);
  const Tensor rng_state = given_state ? *given_state : query.new_empty({0}, at::kLong);
  if (!needs_folding(query, key, key, options)) {
    return ops::attention_weights_forward(query, key, logsumexp, rng_state, options, average_heads, row_begin, row_end);
  }
  const FoldedCall call("attention_weights", query, key, key, options);
  const c10::SymIntArrayRef rows = call.query.sym_sizes().slice(0, 3);
  const auto expected = call.unfolded_sizes(rows, call.rank - 1);
  TORCH_CHECK(logsumexp.sym_sizes().equals(expected), "attention_weights: expected `logsumexp` to be of shape ",
              c10::SymIntArrayRef(expected), ", got ", logsumexp.sym_sizes());
  const Tensor weights = ops::attention_weights_forward(call.query, call.key, logsumexp.reshape_symint(rows), rng_state,
                                                        call.options, average_heads, row_begin, row_end);
  return call.unfold(weights, average_heads ? std::max<int64_t>(call.rank - 1, 2) : call.rank);
}

void implement(torch::Library& m) {
  m.impl("attention", flat_kernel<attention>);
  m.impl("scaled_dot_product_attention", scaled_dot_product_attention);
  m.impl("attention_weights", flat_kernel<attention_weights>);
}

TORCH_LIBRARY_IMPL(attention_ext, CompositeImplicitAutograd, m) { implement(m); }

// vmap does not decompose operators by itself; at this key it sees calls of which no input is mapped, too.
TORCH_LIBRARY_IMPL(attention_ext, FuncTorchVmapMode, m) { implement(m); }

}  // namespace

}  // namespace attention_ext
