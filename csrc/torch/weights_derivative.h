// Derivatives of attention_weights, composed of differentiable torch operators, so that higher orders follow.
//
// prob = keep / (1 - dropout_p) * exp(score - logsumexp) gives d prob = prob * (d score - d logsumexp): dropout needs
// nothing more. prob itself comes from the operator, block of rows after block of rows: a row keeps its number, so the
// dropout bits are those of the whole call. Weights averaged over heads take one block per head, which keeps memory a
// small multiple of the caller's own memory.
#pragma once

#include "torch/ops.h"

namespace attention_ext {

struct RowBlock {
  c10::SymInt begin, size;
};

// A call of the operator, in accumulate type.
class WeightsCall {
 public:
  WeightsCall(const at::Tensor& query, const at::Tensor& key, const at::Tensor& logsumexp, const at::Tensor& rng_state,
              const AttentionOptions& options, bool average_heads, const std::optional<c10::SymInt>& row_begin,
              const std::optional<c10::SymInt>& row_end);

  at::Tensor query, key, logsumexp, rng_state;
  AttentionOptions options;
  bool average_heads;
  c10::SymInt row_begin, row_end;
  at::ScalarType dtype;  // of the weights

  c10::SymInt length_q() const { return query.sym_size(2); }
  c10::SymInt length_k() const { return key.sym_size(2); }
  c10::SymFloat scale() const;
  std::vector<RowBlock> blocks() const;
  std::vector<c10::SymInt> score_sizes(const RowBlock& block) const;

  // (B, H, rows, Lk) each
  at::Tensor prob(const RowBlock& block) const;
  at::Tensor dot(const at::Tensor& q_rows, const at::Tensor& k) const;
  at::Tensor softcap_tanh(const RowBlock& block) const;
  at::Tensor softcap_slope(const RowBlock& block) const;

  at::Tensor positions(const c10::SymInt& begin, const c10::SymInt& size) const;  // begin, begin + 1, ...: (size,)
  at::Tensor distance(const RowBlock& block) const;  // |diagonal - k|: (1 or B, 1, rows, Lk)

  // (B, H, rows, Lk), undefined where zero: of scale * query . key, of the score, and the mixed second one of the score
  at::Tensor dot_tangent(const RowBlock& block, const ops::InputTangents& tangents) const;
  at::Tensor score_tangent(const RowBlock& block, const ops::InputTangents& tangents) const;
  at::Tensor second_score_tangent(const RowBlock& block, const ops::InputTangents& first,
                                  const ops::InputTangents& second) const;

  at::Tensor diagonal(const at::Tensor& q) const;  // the key that q is aligned with

  // Zeros for keys or values beyond a length, and for those that no query's band or block of the block mask reaches:
  // they may hold anything, and 0 times NaN is NaN.
  at::Tensor visible(const at::Tensor& keys) const;
  at::Tensor hidden_by_blocks() const;  // (B or 1, Hkv or 1, Lk, 1), bool

  // GQA as plain matrices: (B, H, rows, n) as (B, Hkv, group * rows, n), and back
  at::Tensor grouped(const at::Tensor& rows) const;
  at::Tensor ungrouped(const at::Tensor& rows) const;
};

// Gradients of the inputs of WeightsRule (autograd.cpp); undefined where not wanted.
std::vector<at::Tensor> weights_gradients(const WeightsCall& call, const at::Tensor& grad,
                                          const std::vector<bool>& wanted);

// logsumexp_tangent may be undefined.
at::Tensor weights_tangent(const WeightsCall& call, const ops::InputTangents& tangents,
                           const at::Tensor& logsumexp_tangent);

}  // namespace attention_ext
