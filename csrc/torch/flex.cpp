// flex_attention: attention with a compiled score_mod, on a CPU.
//
// captured: the tensors that the score_mod reads by index, in the order of its compiled functions. Derivatives are
// registered in Python (attention_ext/flex), where the function is known as a graph.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "torch/device.h"
#include "torch/gradients.h"
#include "torch/logsumexp_low.h"
#include "torch/outputs.h"
#include "torch/score_mods.h"

namespace attention_ext {

namespace {

using at::Tensor;

using Outputs = std::tuple<Tensor, Tensor, Tensor>;                         // out, logsumexp, max_scores
using Gradients = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;  // of query, key, value, captured

constexpr const char* kForward = "flex_attention_forward";
constexpr const char* kBackward = "flex_attention_backward";

constexpr int64_t kMostPositions = int64_t{1} << 30;  // compiled functions keep positions and their sums in 32 bits
constexpr int64_t kMostCopies = 32;                   // of gradients of captured tensors: the jobs that make them
constexpr int64_t kCopiedNumbers = int64_t{1} << 23;  // in all of the copies, unless one has more

Sizes check(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
            const AttentionOptions& options) {
  TORCH_CHECK(options.dropout_p == 0, op, ": expected `dropout_p` to be 0 with a score_mod, got ", options.dropout_p);
  return check_attention(op, query, key, &value, options);
}

// Holds the memory that a problem with a score_mod points to.
class Call {
 public:
  // wanted: for each captured tensor, whether its gradient is; none if empty.
  Call(const char* op, AttentionProblem& problem, std::string_view key, const std::vector<Tensor>& captured,
       const c10::List<bool>& wanted)
      : op_(op) {
    const CompiledScoreMod compiled = compiled_score_mod(op, key);
    TORCH_CHECK(compiled.is_double == (problem.dtype == DType::kFloat64), op,
                ": expected `score_mod` to be compiled for the arithmetic of `query`, got one for ",
                compiled.is_double ? "double" : "float");
    TORCH_CHECK(static_cast<int64_t>(captured.size()) == compiled.captured, op, ": expected `captured` to be ",
                compiled.captured, " tensors, got ", captured.size());
    TORCH_CHECK_NOT_IMPLEMENTED(
        std::max({problem.batch, problem.heads, problem.seqlen_q, problem.seqlen_k}) <= kMostPositions, op,
        ": expected at most 2^30 batch entries, heads, queries and keys with a score_mod, got ", problem.batch, ", ",
        problem.heads, ", ", problem.seqlen_q, " and ", problem.seqlen_k);
    int64_t numbers = 0;
    for (size_t i = 0; i < std::min(wanted.size(), captured.size()); ++i)
      numbers += wanted.get(i) ? captured[i].numel() : 0;
    const int64_t copies = numbers == 0 ? 0 : std::clamp(kCopiedNumbers / numbers, int64_t{1}, kMostCopies);
    for (size_t i = 0; i < captured.size(); ++i) {
      TORCH_CHECK(captured[i].is_cpu(), op, ": expected `captured` to be on the CPU, got a tensor on ",
                  captured[i].device());
      const bool has_grad = i < wanted.size() && wanted.get(i);
      grads_.push_back(has_grad ? at::zeros({copies, captured[i].numel()}, at::kDouble) : Tensor());
    }
    for (int64_t copy = 0; copy < std::max<int64_t>(copies, 1); ++copy) {
      for (size_t i = 0; i < captured.size(); ++i) {
        const Tensor& tensor = captured[i];
        double* grad = grads_[i].defined() ? grads_[i].mutable_data_ptr<double>() + copy * tensor.numel() : nullptr;
        captured_.push_back({tensor.const_data_ptr(), tensor.sizes().data(), tensor.strides().data(), grad});
      }
    }
    call_ = {compiled.function, compiled.gradient, captured_.data(), compiled.captured, copies, &index_error_};
    problem.score_mod = &call_;
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // captured: where a tensor has no number, none can be read.
  void run(Pass pass, const AttentionProblem& problem, const std::vector<Tensor>& captured) {
    if (problem.batch == 0 || problem.heads == 0 || problem.seqlen_q == 0) return;
    index_error_ = problem.seqlen_k > 0 &&
                   std::any_of(captured.begin(), captured.end(), [](const Tensor& x) { return x.numel() == 0; });
    if (!index_error_) device_for(at::kCPU).run(pass, problem);
    TORCH_CHECK_INDEX(!index_error_, op_,
                      ": expected `score_mod` to index captured tensors within their sizes, and not to divide an "
                      "integer by 0, got an index outside or a division by 0: clamp it, also at positions that a mask "
                      "hides");
  }

  std::vector<Tensor> gradients(const std::vector<Tensor>& captured) const {
    std::vector<Tensor> results;
    results.reserve(captured.size());
    for (size_t i = 0; i < captured.size(); ++i) {
      results.push_back(grads_[i].defined() ? grads_[i].sum(0).view(captured[i].sizes()).to(captured[i].scalar_type())
                                            : at::empty({0}, captured[i].options()));
    }
    return results;
  }

 private:
  const char* op_;
  std::vector<Tensor> grads_;  // (copies, numbers), undefined where not wanted
  std::vector<CapturedTensor> captured_;
  bool index_error_ = false;
  ScoreModCall call_{};
};

Tensor empty_max_scores(const Tensor& logsumexp, bool wanted) {
  return wanted ? at::empty_like(logsumexp) : at::empty({0}, logsumexp.options());
}

Outputs forward(const Tensor& query, const Tensor& key, const Tensor& value, std::string_view score_mod,
                const std::vector<Tensor>& captured, bool compute_max_scores, const AttentionOptions& options) {
  count_call(Pass::kForward);
  const Sizes sizes = check(kForward, query, key, value, options);
  const auto [out, logsumexp, rng_state] = empty_forward(query, sizes, empty_rng_state(query, options));
  Tensor max_scores = empty_max_scores(logsumexp, compute_max_scores);
  ForwardProblem problem;
  Converted converted;
  fill_problem(problem, converted, kForward, sizes, query, key, &value, nullptr, options);
  problem.out = view_of(out);
  problem.logsumexp = logsumexp.mutable_data_ptr();
  if (compute_max_scores) problem.max_scores = max_scores.mutable_data_ptr();
  Call(kForward, problem, score_mod, captured, c10::List<bool>()).run(Pass::kForward, problem, captured);
  return {out, logsumexp, max_scores};
}

Outputs forward_meta(const Tensor& query, const Tensor& key, const Tensor& value, std::string_view /*score_mod*/,
                     const std::vector<Tensor>& /*captured*/, bool compute_max_scores,
                     const AttentionOptions& options) {
  const Sizes sizes = check(kForward, query, key, value, options);
  const auto [out, logsumexp, rng_state] = empty_forward(query, sizes, empty_rng_state(query, options));
  return {out, logsumexp, empty_max_scores(logsumexp, compute_max_scores)};
}

Gradients backward(const Tensor& grad_out, const std::optional<Tensor>& grad_logsumexp, const Tensor& query,
                   const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& logsumexp,
                   std::string_view score_mod, const std::vector<Tensor>& captured, const c10::List<bool>& wanted,
                   const AttentionOptions& options) {
  count_call(Pass::kBackward);
  const Sizes sizes = check_backward(kBackward, grad_out, grad_logsumexp, query, key, value, out, logsumexp,
                                     empty_rng_state(query, options), options);
  BackwardProblem problem;
  Converted converted;
  fill_problem(problem, converted, kBackward, sizes, query, key, &value, nullptr, options);
  const GradientBuffers gradients(problem, query, key, value, options, {true, true, true, false, false, false});
  gradients.zero();
  problem.out = view_of(out);
  problem.grad_out = view_of(grad_out);
  problem.logsumexp = contiguous_data(logsumexp, converted);
  if (grad_logsumexp) problem.grad_logsumexp = contiguous_data(*grad_logsumexp, converted);
  Call call(kBackward, problem, score_mod, captured, wanted);
  problem.logsumexp_low = logsumexp_low(problem, logsumexp, converted);
  call.run(Pass::kBackward, problem, captured);
  const auto made = gradients.results();
  return {std::get<0>(made), std::get<1>(made), std::get<2>(made), call.gradients(captured)};
}

Gradients backward_meta(const Tensor& grad_out, const std::optional<Tensor>& grad_logsumexp, const Tensor& query,
                        const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& logsumexp,
                        std::string_view /*score_mod*/, const std::vector<Tensor>& captured,
                        const c10::List<bool>& wanted, const AttentionOptions& options) {
  check_backward(kBackward, grad_out, grad_logsumexp, query, key, value, out, logsumexp,
                 empty_rng_state(query, options), options);
  const auto like = [](const Tensor& x) {
    return empty_heads(x, x.sym_size(0), x.sym_size(1), x.sym_size(2), x.sym_size(3));
  };
  std::vector<Tensor> of_captured;
  of_captured.reserve(captured.size());
  for (size_t i = 0; i < captured.size(); ++i) {
    of_captured.push_back(i < wanted.size() && wanted.get(i)
                              ? at::empty_symint(captured[i].sym_sizes(), captured[i].options())
                              : at::empty({0}, captured[i].options()));
  }
  return {like(query), like(key), like(value), of_captured};
}

TORCH_LIBRARY_IMPL(attention_ext, CPU, m) {
  m.impl("flex_attention_forward", flat_kernel<forward>);
  m.impl("flex_attention_backward", flat_kernel<backward>);
}

TORCH_LIBRARY_IMPL(attention_ext, Meta, m) {
  m.impl("flex_attention_forward", flat_kernel<forward_meta>);
  m.impl("flex_attention_backward", flat_kernel<backward_meta>);
}

}  // namespace

}  // namespace attention_ext
