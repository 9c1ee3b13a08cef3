// The operators on the CPU: make outputs, make the Problem, run a kernel. Calls without rows or without keys end here.
#include <ATen/CPUGeneratorImpl.h>
#include <torch/library.h>

#include <limits>
#include <mutex>

#include "torch/cpu_run.h"
#include "torch/gradients.h"

namespace attention_ext {

namespace {

using at::Tensor;

void draw_rng_state(const Tensor& rng_state) {
  auto* generator =
      at::get_generator_or_default<at::CPUGeneratorImpl>(std::nullopt, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  int64_t* words = rng_state.mutable_data_ptr<int64_t>();
  words[0] = static_cast<int64_t>(generator->random64());
  words[1] = 0;
}

// No rows, or none that sees a key.
bool is_empty(const AttentionProblem& problem) {
  return problem.batch == 0 || problem.heads == 0 || problem.seqlen_q == 0 || problem.seqlen_k == 0;
}

// Of (B, H, Lq), the rows of one sequence: (H, its length)
Tensor rows_of(const AttentionProblem& problem, const Tensor& tensor, int64_t b) {
  if (!problem.cu_seqlens_q) return tensor.select(0, b);
  const int64_t begin = problem.cu_seqlens_q[b];
  return tensor.select(0, 0).narrow(1, begin, problem.cu_seqlens_q[b + 1] - begin);
}

// (heads,) or (sequences, heads) to every row of logsumexp, or of its tangent
void copy_sinks(const AttentionProblem& problem, const Tensor& sinks, const Tensor& logsumexp) {
  for (int64_t b = 0; b < problem.batch; ++b) {
    rows_of(problem, logsumexp, b).copy_((sinks.dim() == 2 ? sinks.select(0, b) : sinks).unsqueeze(1));
  }
}

// Without keys out stands still and logsumexp moves with the sinks.
void move_with_sinks(const AttentionProblem& problem, const ops::InputTangents& tangents, const Tensor& out_tangent,
                     const Tensor& logsumexp_tangent) {
  out_tangent.zero_();
  logsumexp_tangent.zero_();
  if (tangents.sinks) copy_sinks(problem, *tangents.sinks, logsumexp_tangent);
}

void fill_backward(BackwardProblem& problem, Converted& converted, const Tensor& grad_out,
                   const std::optional<Tensor>& grad_logsumexp, const Tensor& out, const Tensor& logsumexp) {
  problem.out = view_of(out);
  problem.grad_out = view_of(grad_out);
  problem.logsumexp = contiguous_data(logsumexp, converted);
  if (grad_logsumexp) problem.grad_logsumexp = contiguous_data(*grad_logsumexp, converted);
}

ops::Forward attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                           const AttentionOptions& options) {
  const char* op = "attention";
  count_call(Pass::kForward);
  const Sizes sizes = check_attention(op, query, key, &value, options);
  ops::Forward outputs = empty_forward(query, sizes, options);
  auto& [out, logsumexp, rng_state] = outputs;
  if (options.dropout_p > 0) draw_rng_state(rng_state);

  ForwardProblem problem;
  Converted converted;
  fill_problem(problem, converted, op, sizes, query, key, &value, &rng_state, options);
  if (is_empty(problem)) {
    out.zero_();
    logsumexp.fill_(-std::numeric_limits<double>::infinity());
    if (options.sinks) copy_sinks(problem, *options.sinks, logsumexp);
    return outputs;
  }
  problem.out = view_of(out);
  problem.logsumexp = logsumexp.mutable_data_ptr();
  run_on_cpu(Pass::kForward, problem);
  return outputs;
}

// A row without keys has the sink for its logsumexp, so it passes on what reaches the one to the other.
void sum_for_sinks(const AttentionProblem& problem, const Tensor& grad_logsumexp, const Tensor& sums) {
  for (int64_t b = 0; b < problem.batch; ++b) {
    sums.select(0, b).copy_(rows_of(problem, grad_logsumexp, b).sum(-1, false, at::kDouble));
  }
}

ops::Gradients attention_backward_cpu(const Tensor& grad_out, const std::optional<Tensor>& grad_logsumexp,
                                      const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                                      const Tensor& logsumexp, const Tensor& rng_state, const AttentionOptions& options,
                                      ops::OutputMask output_mask) {
  const char* op = "attention_backward";
  count_call(Pass::kBackward);
  const Sizes sizes = check_attention(op, query, key, &value, options);
  check_saved(op, sizes, query, out, logsumexp, rng_state, options);
  check_backward(op, sizes, grad_out, grad_logsumexp, query);
  BackwardProblem problem;
  Converted converted;
  fill_problem(problem, converted, op, sizes, query, key, &value, &rng_state, options);
  const GradientBuffers gradients(problem, query, key, value, options, output_mask);
  if (is_empty(problem)) {
    gradients.zero();
    if (problem.grad_sinks && grad_logsumexp) sum_for_sinks(problem, *grad_logsumexp, gradients.sinks());
    return gradients.results();
  }
  fill_backward(problem, converted, grad_out, grad_logsumexp, out, logsumexp);
  run_on_cpu(Pass::kBackward, problem);
  return gradients.results();
}

ops::OutputTangents attention_jvp_cpu(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                                      const Tensor& logsumexp, const Tensor& rng_state,
                                      const ops::InputTangents& tangents, const AttentionOptions& options) {
  const char* op = "attention_jvp";
  count_call(Pass::kJvp);
  const Sizes sizes = check_attention(op, query, key, &value, options);
  check_saved(op, sizes, query, out, logsumexp, rng_state, options);
  check_tangents(op, sizes, tangents, query, key, value, options);
  JvpProblem problem;
  Converted converted;
  fill_problem(problem, converted, op, sizes, query, key, &value, &rng_state, options);
  fill_tangents(problem.tangent, converted, op, problem, tangents);
  ops::OutputTangents outputs = empty_tangents(query, sizes);
  auto& [out_tangent, logsumexp_tangent] = outputs;
  if (is_empty(problem)) {
    move_with_sinks(problem, tangents, out_tangent, logsumexp_tangent);
    return outputs;
  }
  problem.out = view_of(out);
  problem.logsumexp = contiguous_data(logsumexp, converted);
  problem.out_tangent = view_of(out_tangent);
  problem.logsumexp_tangent = logsumexp_tangent.mutable_data_ptr();
  run_on_cpu(Pass::kJvp, problem);
  return outputs;
}

ops::SecondOrder attention_double_backward_cpu(const ops::InputTangents& tangents, const Tensor& grad_out,
                                               const std::optional<Tensor>& grad_logsumexp, const Tensor& query,
                                               const Tensor& key, const Tensor& value, const Tensor& out,
                                               const Tensor& logsumexp, const Tensor& rng_state,
                                               const AttentionOptions& options, ops::OutputMask output_mask) {
  const char* op = "attention_double_backward";
  count_call(Pass::kDoubleBackward);
  const Sizes sizes = check_attention(op, query, key, &value, options);
  check_saved(op, sizes, query, out, logsumexp, rng_state, options);
  check_backward(op, sizes, grad_out, grad_logsumexp, query);
  check_tangents(op, sizes, tangents, query, key, value, options);
  DoubleBackwardProblem problem;
  Converted converted;
  fill_problem(problem, converted, op, sizes, query, key, &value, &rng_state, options);
  fill_tangents(problem.tangent, converted, op, problem, tangents);
  const GradientBuffers gradients(problem, query, key, value, options, output_mask);
  ops::OutputTangents outputs = empty_tangents(query, sizes);
  auto& [out_tangent, logsumexp_tangent] = outputs;
  if (is_empty(problem)) {
    gradients.zero();
    move_with_sinks(problem, tangents, out_tangent, logsumexp_tangent);
    return std::tuple_cat(outputs, gradients.results());
  }
  fill_backward(problem, converted, grad_out, grad_logsumexp, out, logsumexp);
  problem.out_tangent = view_of(out_tangent);
  problem.logsumexp_tangent = logsumexp_tangent.mutable_data_ptr();
  run_on_cpu(Pass::kDoubleBackward, problem);
  return std::tuple_cat(outputs, gradients.results());
}

Tensor attention_weights_cpu(const Tensor& query, const Tensor& key, const Tensor& logsumexp, const Tensor& rng_state,
                             const AttentionOptions& options, bool average_heads, std::optional<c10::SymInt> row_begin,
                             std::optional<c10::SymInt> row_end) {
  const char* op = "attention_weights";
  count_call(Pass::kWeights);
  const Sizes sizes = check_attention(op, query, key, nullptr, options);
  const Rows rows = check_weights(op, sizes, query, logsumexp, rng_state, options, row_begin, row_end);
  WeightsProblem problem;
  Converted converted;
  fill_problem(problem, converted, op, sizes, query, key, nullptr, &rng_state, options);
  Tensor weights = empty_weights(query, sizes, average_heads, rows);
  if (is_empty(problem) || weights.numel() == 0) return weights.zero_();
  problem.weights = view_of(average_heads ? weights.unsqueeze(1) : weights);
  problem.average_heads = average_heads;
  problem.row_begin = rows.begin.expect_int();
  problem.row_end = rows.end.expect_int();
  problem.logsumexp = contiguous_data(logsumexp, converted);
  run_on_cpu(Pass::kWeights, problem);
  return weights;
}

std::string attention_explain_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                  const AttentionOptions& options, std::string_view which) {
  const char* op = "attention_explain";
  const Sizes sizes = check_attention(op, query, key, &value, options);
  Converted converted;
  const auto explain = [&](auto problem) {
    fill_problem(problem, converted, op, sizes, query, key, &value, nullptr, options);
    return explain_cpu_kernels(pass_of(which), problem);
  };
  switch (pass_of(which)) {
    case Pass::kForward:
      return explain(ForwardProblem{});
    case Pass::kBackward:
      return explain(BackwardProblem{});
    case Pass::kWeights:
      return explain(WeightsProblem{});
    case Pass::kJvp:
      return explain(JvpProblem{});
    case Pass::kDoubleBackward:
      return explain(DoubleBackwardProblem{});
  }
  return {};
}

void implement(torch::Library& m) {
  m.impl("attention", flat_kernel<attention_cpu>);
  m.impl("attention_backward", flat_kernel<attention_backward_cpu>);
  m.impl("attention_jvp", flat_kernel<attention_jvp_cpu>);
  m.impl("attention_double_backward", flat_kernel<attention_double_backward_cpu>);
  m.impl("attention_weights", flat_kernel<attention_weights_cpu>);
}

TORCH_LIBRARY_IMPL(attention_ext, CPU, m) {
  implement(m);
  m.impl("attention_explain", flat_kernel<attention_explain_cpu>);
}

// Tensors that the checks refuse come here, to be refused by name.
TORCH_LIBRARY_IMPL(attention_ext, SparseCPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(attention_ext, SparseCsrCPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(attention_ext, QuantizedCPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(attention_ext, MkldnnCPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(attention_ext, NestedTensorCPU, m) { implement(m); }

}  // namespace

}  // namespace attention_ext
