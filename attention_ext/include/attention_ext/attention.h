// attention_ext for C++ programs: link to attention_ext::attention_ext (CMake) and call attention_ext::attention.
// The call goes through torch's dispatcher, so autograd, autocast and every device work as they do from Python.
#pragma once

#include "attention_ext/flat.h"
#include "attention_ext/options.h"

namespace attention_ext {

struct AttentionResult {
  at::Tensor out;        // (..., heads, seqlen_q, head_dim_v)
  at::Tensor logsumexp;  // (..., heads, seqlen_q), natural logarithm, differentiable
  at::Tensor rng_state;  // the state of dropout: seed and offset
};

// query (..., heads, seqlen_q, head_dim), key (..., kv_heads, seqlen_k, head_dim), value (..., kv_heads, seqlen_k,
// head_dim_v), any strides; leading dimensions broadcast. rng_state: of another call, to repeat its dropout; none:
// drawn. Throws c10::Error where an argument is not as it should be.
inline AttentionResult attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const AttentionOptions& options = {},
                                 const std::optional<at::Tensor>& rng_state = std::nullopt) {
  using Function =
      std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                     const AttentionOptions&, const std::optional<at::Tensor>&);
  static const Operator<Function> op("attention_ext::attention");
  auto [out, logsumexp, used_state] = op(query, key, value, options, rng_state);
  return {out, logsumexp, used_state};
}

}  // namespace attention_ext
