#include "torch/composed_jvp.h"

#include <limits>

#include "torch/weights_derivative.h"

namespace attention_ext {

using at::Tensor;

ops::OutputTangents composed_jvp(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                                 const Tensor& logsumexp, const Tensor& rng_state, const ops::InputTangents& tangents,
                                 const AttentionOptions& options) {
  TORCH_CHECK_NOT_IMPLEMENTED(!options.cu_seqlens_q,
                              "attention_jvp: forward mode over forward mode is not implemented with cu_seqlens_q");
  if (TORCH_GUARD_OR_FALSE(logsumexp.sym_numel().sym_eq(0))) return {at::zeros_like(out), at::zeros_like(logsumexp)};
  const WeightsCall call(query, key, logsumexp, rng_state, options, /*average_heads=*/false, std::nullopt,
                         std::nullopt);
  const auto dtype = call.query.scalar_type();
  const auto weigh = [&](const Tensor& weights, const Tensor& v) {
    return call.ungrouped(at::matmul(call.grouped(weights), call.visible(v.to(dtype))));
  };
  const RowBlock all = call.blocks().front();
  const Tensor kept = call.prob(all);  // after dropout
  Tensor out_tangent = at::zeros_like(out, dtype), logsumexp_tangent = at::zeros_like(logsumexp);
  if (const Tensor score = call.score_tangent(all, tangents); score.defined()) {
    WeightsCall without_dropout = call;
    without_dropout.options.dropout_p = 0;
    const Tensor prob = options.dropout_p > 0 ? without_dropout.prob(all) : kept;
    logsumexp_tangent = logsumexp_tangent + (prob * score).sum(-1);
    out_tangent = out_tangent + weigh(kept * score, value);
  }
  if (tangents.sinks) {
    constexpr double kHidden = -std::numeric_limits<double>::infinity();
    const Tensor score = options.sinks->to(dtype).unsqueeze(-1) - logsumexp;
    const Tensor share = score.masked_fill(logsumexp == kHidden, kHidden).exp();
    logsumexp_tangent = logsumexp_tangent + share * tangents.sinks->to(dtype).unsqueeze(-1);
  }
  if (tangents.value) out_tangent = out_tangent + weigh(kept, *tangents.value);
  out_tangent = out_tangent - logsumexp_tangent.unsqueeze(-1) * out.to(dtype);
  return {out_tangent.to(out.scalar_type()), logsumexp_tangent};
}

}  // namespace attention_ext
