// Every check of an operator's arguments that needs no values: SymInts, so that it serves meta and traced tensors too.
// All throw c10::Error with a message "attention: expected `key` to be ..., got ...".
#pragma once

#include "torch/ops.h"

namespace attention_ext {

struct Sizes {
  c10::SymInt batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v;
  c10::SymInt sequences;  // batch, or with cu_seqlens the number of sequences packed into one
  bool packed = false;    // cu_seqlens are given
};

// value may be null: head_dim_v is 0 then.
Sizes check_attention(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor* value,
                      const AttentionOptions& options);

// The arguments of attention, for its kernels and its fake alike; and so below, for each operator.
Sizes check_forward(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                    const AttentionOptions& options, const std::optional<at::Tensor>& rng_state);

Sizes check_backward(const char* op, const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_logsumexp,
                     const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
                     const at::Tensor& logsumexp, const at::Tensor& rng_state, const AttentionOptions& options);

Sizes check_jvp(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                const at::Tensor& out, const at::Tensor& logsumexp, const at::Tensor& rng_state,
                const ops::InputTangents& tangents, const AttentionOptions& options);

Sizes check_double_backward(const char* op, const ops::InputTangents& tangents, const at::Tensor& grad_out,
                            const std::optional<at::Tensor>& grad_logsumexp, const at::Tensor& query,
                            const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
                            const at::Tensor& logsumexp, const at::Tensor& rng_state, const AttentionOptions& options);

struct Rows {
  c10::SymInt begin, end;
};
Rows check_weights(const char* op, const Sizes& sizes, const at::Tensor& query, const at::Tensor& logsumexp,
                   const at::Tensor& rng_state, const AttentionOptions& options,
                   const std::optional<c10::SymInt>& row_begin, const std::optional<c10::SymInt>& row_end);

inline at::ScalarType accumulate_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace attention_ext
