// attention_ext for C++ programs: link to attention_ext::attention_ext (CMake) and call attention_ext::attention.
// The call goes through torch's dispatcher, so autograd, autocast and every device work as they do from Python.
#pragma once

#include "attention_ext/flat.h"
#include "attention_ext/options.h"

namespace attention_ext {

struct AttentionResult {
  at::Tensor out;        // (batch, heads, seqlen_q, head_dim_v)
  at::Tensor logsumexp;  // (batch, heads, seqlen_q), natural logarithm, differentiable
  at::Tensor rng_state;  // what dropout drew: seed and offset
};

// query (batch, heads, seqlen_q, head_dim), key (batch, kv_heads, seqlen_k, head_dim), value (batch, kv_heads,
// seqlen_k, head_dim_v), any strides. Throws c10::Error where an argument is not as it should be.
inline AttentionResult attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const AttentionOptions& options = {}) {
  using Function = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                                  const at::Tensor&, const AttentionOptions&);
  static const Operator<Function> op("attention_ext::attention");
  auto [out, logsumexp, rng_state] = op(query, key, value, options);
  return {out, logsumexp, rng_state};
}

}  // namespace attention_ext
