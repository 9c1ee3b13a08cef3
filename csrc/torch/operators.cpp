// The operators on every device: make outputs, make the Problem, let the device run a kernel. Calls without rows end
// here.
#include "torch/operators.h"

#include <ATen/ops/randint.h>

#include <limits>

#include "torch/device.h"
#include "torch/gradients.h"
#include "torch/leading_dims.h"
#include "torch/logsumexp_low.h"

namespace attention_ext {

namespace {

using at::Tensor;

// Packed rows may be there without a sequence that owns them.
bool has_rows(const AttentionProblem& problem) {
  return (problem.batch > 0 || problem.cu_seqlens_q) && problem.heads > 0 && problem.seqlen_q > 0;
}

void run(const Tensor& query, Pass pass, const AttentionProblem& problem) {
  const c10::DeviceGuard guard(query.device());
  device_for(query.device().type()).run(pass, problem);
}

template <class Problem>
void fill_logsumexp(Problem& problem, Converted& converted, const Tensor& logsumexp) {
  problem.logsumexp = contiguous_data(logsumexp, converted);
  problem.logsumexp_low = logsumexp_low(problem, logsumexp, converted);
}

void fill_backward(BackwardProblem& problem, Converted& converted, const Tensor& grad_out,
                   const std::optional<Tensor>& grad_logsumexp, const Tensor& out, const Tensor& logsumexp) {
  problem.out = view_of(out);
  problem.grad_out = view_of(grad_out);
  fill_logsumexp(problem, converted, logsumexp);
  if (grad_logsumexp) problem.grad_logsumexp = contiguous_data(*grad_logsumexp, converted);
}

// By an operator of torch: a compiled graph draws by the same one, so it has the same bits for the same seed. The vmap
// that gradcheck uses for batched gradients refuses random operators; it calls this kernel sample by sample.
Tensor drawn_rng_state(const Tensor& query) {
  const c10::impl::ExcludeDispatchKeyGuard below_vmap(c10::DispatchKey::VmapMode);
  constexpr int64_t kEnd = std::numeric_limits<int64_t>::max();
  return at::randint(/*low=*/0, kEnd, {2}, /*generator=*/std::nullopt, query.options().dtype(at::kLong));
}

// The state that a call with dropout uses, apart from its arguments; empty without dropout.
Tensor make_rng_state(const Tensor& query, const AttentionOptions& options, const std::optional<Tensor>& given) {
  if (options.dropout_p == 0) return empty_rng_state(query, options);
  return given ? given->clone(at::MemoryFormat::Contiguous) : drawn_rng_state(query);
}

ops::Forward attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                               const AttentionOptions& options, const std::optional<Tensor>& given_state) {
  const char* op = "attention";
  count_call(Pass::kForward);
  const Sizes sizes = check_forward(op, query, key, value, options, given_state);
  const ops::Forward outputs = empty_forward(query, sizes, make_rng_state(query, options, given_state));
  const auto& [out, logsumexp, rng_state] = outputs;

  ForwardProblem problem;
  Converted converted;
  fill_problem(problem, converted, op, sizes, query, key, &value, &rng_state, options);
  if (!has_rows(problem)) return outputs;
  problem.out = view_of(out);
  problem.logsumexp = logsumexp.mutable_data_ptr();
  run(query, Pass::kForward, problem);
  return outputs;
}

ops::Gradients attention_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_logsumexp,
                                  const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                                  const Tensor& logsumexp, const Tensor& rng_state, const AttentionOptions& options,
                                  ops::OutputMask output_mask) {
  const char* op = "attention_backward";
  count_call(Pass::kBackward);
  const Sizes sizes =
      check_backward(op, grad_out, grad_logsumexp, query, key, value, out, logsumexp, rng_state, options);
  BackwardProblem problem;
  Converted converted;
  fill_problem(problem, converted, op, sizes, query, key, &value, &rng_state, options);
  const GradientBuffers gradients(problem, query, key, value, options, output_mask);
  if (!has_rows(problem)) {
    gradients.zero();
    return gradients.results();
  }
  fill_backward(problem, converted, grad_out, grad_logsumexp, out, logsumexp);
  run(query, Pass::kBackward, problem);
  return gradients.results();
}

ops::OutputTangents attention_jvp(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                                  const Tensor& logsumexp, const Tensor& rng_state, const ops::InputTangents& tangents,
                                  const AttentionOptions& options) {
  const char* op = "attention_jvp";
  count_call(Pass::kJvp);
  const Sizes sizes = check_jvp(op, query, key, value, out, logsumexp, rng_state, tangents, options);
  JvpProblem problem;
  Converted converted;
  fill_problem(problem, converted, op, sizes, query, key, &value, &rng_state, options);
  fill_tangents(problem.tangent, converted, op, problem, tangents);
  ops::OutputTangents outputs = empty_tangents(query, sizes);
  auto& [out_tangent, logsumexp_tangent] = outputs;
  if (!has_rows(problem)) return outputs;
  problem.out = view_of(out);
  fill_logsumexp(problem, converted, logsumexp);
  problem.out_tangent = view_of(out_tangent);
  problem.logsumexp_tangent = logsumexp_tangent.mutable_data_ptr();
  run(query, Pass::kJvp, problem);
  return outputs;
}

ops::SecondOrder attention_double_backward(const ops::InputTangents& tangents, const Tensor& grad_out,
                                           const std::optional<Tensor>& grad_logsumexp, const Tensor& query,
                                           const Tensor& key, const Tensor& value, const Tensor& out,
                                           const Tensor& logsumexp, const Tensor& rng_state,
                                           const AttentionOptions& options, ops::OutputMask output_mask,
                                           bool compute_out_tangent) {
  const char* op = "attention_double_backward";
  count_call(Pass::kDoubleBackward);
  const Sizes sizes = check_double_backward(op, tangents, grad_out, grad_logsumexp, query, key, value, out, logsumexp,
                                            rng_state, options);
  DoubleBackwardProblem problem;
  Converted converted;
  fill_problem(problem, converted, op, sizes, query, key, &value, &rng_state, options);
  fill_tangents(problem.tangent, converted, op, problem, tangents);
  const GradientBuffers gradients(problem, query, key, value, options, output_mask);
  ops::OutputTangents outputs = empty_tangents(query, sizes, compute_out_tangent);
  auto& [out_tangent, logsumexp_tangent] = outputs;
  if (!has_rows(problem)) {
    gradients.zero();
    return std::tuple_cat(outputs, gradients.results());
  }
  fill_backward(problem, converted, grad_out, grad_logsumexp, out, logsumexp);
  if (compute_out_tangent) problem.out_tangent = view_of(out_tangent);
  problem.logsumexp_tangent = logsumexp_tangent.mutable_data_ptr();
  run(query, Pass::kDoubleBackward, problem);
  return std::tuple_cat(outputs, gradients.results());
}

Tensor attention_weights_forward(const Tensor& query, const Tensor& key, const Tensor& logsumexp,
                                 const Tensor& rng_state, const AttentionOptions& options, bool average_heads,
                                 std::optional<c10::SymInt> row_begin, std::optional<c10::SymInt> row_end) {
  const char* op = "attention_weights";
  count_call(Pass::kWeights);
  const Sizes sizes = check_attention(op, query, key, nullptr, options);
  const Rows rows = check_weights(op, sizes, query, logsumexp, rng_state, options, row_begin, row_end);
  WeightsProblem problem;
  Converted converted;
  fill_problem(problem, converted, op, sizes, query, key, nullptr, &rng_state, options);
  Tensor weights = empty_weights(query, sizes, average_heads, rows);
  if (weights.numel() == 0) return weights;
  problem.weights = view_of(average_heads ? weights.unsqueeze(1) : weights);
  problem.average_heads = average_heads;
  problem.row_begin = rows.begin.expect_int();
  problem.row_end = rows.end.expect_int();
  fill_logsumexp(problem, converted, logsumexp);
  run(query, Pass::kWeights, problem);
  return weights;
}

std::string attention_explain(const Tensor& query, const Tensor& key, const Tensor& value,
                              const AttentionOptions& options, std::string_view which) {
  const char* op = "attention_explain";
  if (needs_folding(query, key, value, options)) {
    const FoldedCall call(op, query, key, value, options);
    return attention_explain(call.query, call.key, call.value, call.options, which);
  }
  const Pass pass = pass_of(which);
  const Tensor* values = pass == Pass::kWeights ? nullptr : &value;  // which weights are made without
  const Sizes sizes = check_attention(op, query, key, values, options);
  const c10::DeviceGuard guard(query.device());
  Converted converted;
  return with_problem(pass, [&](auto problem) {
    fill_problem(problem, converted, op, sizes, query, key, values, nullptr, options);
    return explain_kernels(query.device().type(), pass, problem);
  });
}

}  // namespace

void implement_operators(torch::Library& m) {
  m.impl("attention_forward", flat_kernel<attention_forward>);
  m.impl("attention_backward", flat_kernel<attention_backward>);
  m.impl("attention_jvp", flat_kernel<attention_jvp>);
  m.impl("attention_double_backward", flat_kernel<attention_double_backward>);
  m.impl("attention_weights_forward", flat_kernel<attention_weights_forward>);
  m.impl("attention_explain", flat_kernel<attention_explain>);
}

}  // namespace attention_ext
