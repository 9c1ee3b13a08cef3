// The operators on the CPU: make outputs, make the Problem, run a kernel. Calls without rows or without keys end here.
#include <ATen/CPUGeneratorImpl.h>
#include <torch/library.h>

#include <limits>
#include <mutex>

#include "torch/cpu_run.h"
#include "torch/outputs.h"
#include "torch/problem.h"

namespace attention_ext {

namespace {

using at::Tensor;

void draw_rng_state(const Tensor& rng_state) {
  auto* generator = at::get_generator_or_default<at::CPUGeneratorImpl>(std::nullopt, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  int64_t* words = rng_state.mutable_data_ptr<int64_t>();
  words[0] = static_cast<int64_t>(generator->random64());
  words[1] = 0;
}

bool has_no_rows(const AttentionProblem& problem) {
  return problem.batch == 0 || problem.heads == 0 || problem.seqlen_q == 0;
}

// Of (B, H, Lq), the rows of one sequence: (H, its length)
Tensor rows_of(const AttentionProblem& problem, const Tensor& tensor, int64_t b) {
  if (!problem.cu_seqlens_q) return tensor.select(0, b);
  const int64_t begin = problem.cu_seqlens_q[b];
  return tensor.select(0, 0).narrow(1, begin, problem.cu_seqlens_q[b + 1] - begin);
}

Tensor of_sequence(const Tensor& per_head, int64_t b) { return per_head.dim() == 2 ? per_head.select(0, b) : per_head; }

void attend_to_nothing(const AttentionProblem& problem, const std::optional<Tensor>& sinks, const Tensor& out,
                       const Tensor& logsumexp) {
  out.zero_();
  logsumexp.fill_(-std::numeric_limits<double>::infinity());
  for (int64_t b = 0; sinks && b < problem.batch; ++b) {
    rows_of(problem, logsumexp, b).copy_(of_sequence(*sinks, b).unsqueeze(1));
  }
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
  if (has_no_rows(problem)) return outputs;
  if (problem.seqlen_k == 0) {
    attend_to_nothing(problem, options.sinks, out, logsumexp);
    return outputs;
  }
  problem.out = view_of(out);
  problem.logsumexp = logsumexp.mutable_data_ptr();
  run_on_cpu(Pass::kForward, problem);
  return outputs;
}

// (sequences, heads) doubles, summed to the shape and dtype of the argument
Tensor per_head_gradient(const Tensor& sums, const Tensor& argument) {
  return (argument.dim() == 1 ? sums.sum(0) : sums).to(argument.scalar_type());
}

// A row without keys has the sink for its logsumexp, so the gradient of one is that of the other.
void sum_for_sinks(const AttentionProblem& problem, const Tensor& grad_logsumexp, const Tensor& sums) {
  for (int64_t b = 0; b < problem.batch; ++b) {
    sums.select(0, b).copy_(rows_of(problem, grad_logsumexp, b).sum(-1, false, at::kDouble));
  }
}

ops::Gradients attention_backward_cpu(const Tensor& grad_out, const std::optional<Tensor>& grad_logsumexp,
                                      const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                                      const Tensor& logsumexp, const Tensor& rng_state,
                                      const AttentionOptions& options, ops::OutputMask output_mask) {
  const char* op = "attention_backward";
  count_call(Pass::kBackward);
  const Sizes sizes = check_attention(op, query, key, &value, options);
  check_backward(op, sizes, grad_out, grad_logsumexp, query, out, logsumexp, rng_state, options);
  BackwardProblem problem;
  Converted converted;
  fill_problem(problem, converted, op, sizes, query, key, &value, &rng_state, options);

  const auto wanted = existing_gradients(options, output_mask);
  const auto accumulate = query.options().dtype(accumulate_type(query.scalar_type()));
  const auto doubles = query.options().dtype(at::kDouble);
  const auto heads_like = [](const Tensor& input) {
    return empty_heads(input, input.size(0), input.size(1), input.size(2), input.size(3));
  };
  Tensor grad_query, grad_key, grad_value, grad_mask, grad_slopes, grad_sinks;
  if (wanted[0]) problem.grad_query = view_of(grad_query = heads_like(query));
  if (wanted[1]) problem.grad_key = view_of(grad_key = heads_like(key));
  if (wanted[2]) problem.grad_value = view_of(grad_value = heads_like(value));
  if (wanted[3]) {
    problem.grad_attn_mask = broadcast_view_of(grad_mask = at::zeros(options.attn_mask->sizes(), accumulate));
  }
  if (wanted[4]) {
    grad_slopes = at::zeros({problem.batch, problem.heads}, doubles);
    problem.grad_alibi_slopes = grad_slopes.mutable_data_ptr<double>();
  }
  if (wanted[5]) {
    grad_sinks = at::zeros({problem.batch, problem.heads}, doubles);
    problem.grad_sinks = grad_sinks.mutable_data_ptr<double>();
  }

  if (has_no_rows(problem) || problem.seqlen_k == 0) {
    for (const Tensor& gradient : {grad_query, grad_key, grad_value}) {
      if (gradient.defined()) gradient.zero_();
    }
    if (wanted[5] && grad_logsumexp) sum_for_sinks(problem, *grad_logsumexp, grad_sinks);
  } else {
    problem.out = view_of(out);
    problem.grad_out = view_of(grad_out);
    problem.logsumexp = contiguous_data(logsumexp, converted);
    if (grad_logsumexp) problem.grad_logsumexp = contiguous_data(*grad_logsumexp, converted);
    run_on_cpu(Pass::kBackward, problem);
  }
  return {wanted[0] ? grad_query : no_gradient(query),
          wanted[1] ? grad_key : no_gradient(query),
          wanted[2] ? grad_value : no_gradient(query),
          wanted[3] ? grad_mask.to(options.attn_mask->scalar_type()) : no_gradient(query),
          wanted[4] ? per_head_gradient(grad_slopes, *options.alibi_slopes) : no_gradient(query),
          wanted[5] ? per_head_gradient(grad_sinks, *options.sinks) : no_gradient(query)};
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
  if (weights.numel() == 0) return weights;
  if (has_no_rows(problem)) return weights.zero_();
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
    case Pass::kForward: return explain(ForwardProblem{});
    case Pass::kBackward: return explain(BackwardProblem{});
    default: return explain(WeightsProblem{});
  }
}

void implement(torch::Library& m) {
  m.impl("attention", flat_kernel<attention_cpu>);
  m.impl("attention_backward", flat_kernel<attention_backward_cpu>);
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
