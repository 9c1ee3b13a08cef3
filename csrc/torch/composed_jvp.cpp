#include "torch/composed_jvp.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "torch/own_precision.h"
#include "torch/weights_derivative.h"

namespace attention_ext {

using at::Tensor;

ops::OutputTangents composed_jvp(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                                 const Tensor& logsumexp, const Tensor& rng_state, const ops::InputTangents& first,
                                 const ops::InputTangents& second, const AttentionOptions& options) {
  TORCH_CHECK_NOT_IMPLEMENTED(!options.cu_seqlens_q,
                              "attention_jvp: forward mode over forward mode is not implemented with cu_seqlens_q");
  if (TORCH_GUARD_OR_FALSE(logsumexp.sym_numel().sym_eq(0))) return {at::zeros_like(out), at::zeros_like(logsumexp)};
  const OwnPrecision guard(query.device().type());
  const WeightsCall call(query, key, logsumexp, rng_state, options, /*average_heads=*/false, std::nullopt,
                         std::nullopt);
  const auto dtype = call.query.scalar_type();
  const RowBlock all = call.blocks().front();
  const Tensor kept = call.prob(all);  // after dropout
  WeightsCall without_dropout = call;
  without_dropout.options.dropout_p = 0;
  const Tensor prob = options.dropout_p > 0 ? without_dropout.prob(all) : kept;
  Tensor sink_prob;
  if (options.sinks) {
    constexpr double kHidden = -std::numeric_limits<double>::infinity();
    const Tensor score = options.sinks->to(dtype).unsqueeze(-1) - logsumexp;
    sink_prob = score.masked_fill(logsumexp == kHidden, kHidden).exp();
  }

  // Tangents of log prob: the score's or the sink's less logsumexp's, (B, H, Lq, Lk or 1) and (B, H, Lq)
  struct Centred {
    Tensor score, sink;
  };
  const auto centred = [&](const ops::InputTangents& tangents) {
    const Tensor score = call.score_tangent(all, tangents);
    const Tensor sink = tangents.sinks ? tangents.sinks->to(dtype).unsqueeze(-1) : Tensor();
    Tensor logsumexp_tangent = at::zeros_like(logsumexp);
    if (score.defined()) logsumexp_tangent = logsumexp_tangent + (prob * score).sum(-1);
    if (sink.defined()) logsumexp_tangent = logsumexp_tangent + sink_prob * sink;
    const Tensor row = logsumexp_tangent.unsqueeze(-1);
    return Centred{score.defined() ? score - row : -row,
                   sink.defined() ? sink - logsumexp_tangent : -logsumexp_tangent};
  };
  const Centred a = centred(first), b = centred(second);
  Tensor both = a.score * b.score;
  if (const Tensor score = call.second_score_tangent(all, first, second); score.defined()) both = both + score;
  Tensor logsumexp_second = (prob * both).sum(-1);
  if (options.sinks) logsumexp_second = logsumexp_second + sink_prob * a.sink * b.sink;

  const auto weigh = [&](const Tensor& weights, const Tensor& v) {
    return call.ungrouped(at::matmul(call.grouped(weights), call.visible(v.to(dtype))));
  };
  // out comes first: the sum is then laid out in memory as out is.
  Tensor out_second = out.to(dtype) * -logsumexp_second.unsqueeze(-1) + weigh(kept * both, value);
  if (second.value) out_second = out_second + weigh(kept * a.score, *second.value);
  if (first.value) out_second = out_second + weigh(kept * b.score, *first.value);
  return {out_second.to(out.scalar_type()), logsumexp_second};
}

}  // namespace attention_ext
