#include "torch/gradients.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "torch/huge_pages.h"

namespace attention_ext {

namespace {

using at::Tensor;

View make_heads_like(Tensor& gradient, const Tensor& input) {
  gradient = empty_heads(input, input.size(0), input.size(1), input.size(2), input.size(3));
  return view_of(gradient);
}

double* make_per_head(Tensor& gradient, const BackwardProblem& problem, const at::TensorOptions& options) {
  gradient = at::zeros({problem.batch, problem.heads}, options.dtype(at::kDouble));
  return gradient.mutable_data_ptr<double>();
}

// Summed over the batch where the input has none, in its dtype.
Tensor like_input(const Tensor& gradient, const Tensor& input) {
  Tensor sum = gradient.dim() > input.dim() ? gradient.sum(0) : gradient;
  if (sum.scalar_type() == input.scalar_type()) return sum;
  return on_huge_pages(at::empty(sum.sizes(), input.options())).copy_(sum);
}

Tensor like_input(const Tensor& gradient, const std::optional<Tensor>& input) { return like_input(gradient, *input); }

}  // namespace

GradientBuffers::GradientBuffers(BackwardProblem& problem, const Tensor& query, const Tensor& key, const Tensor& value,
                                 const AttentionOptions& options, const ops::OutputMask& output_mask)
    : inputs_(ops::differentiable(query, key, value, options)) {
  using namespace ops;
  const auto wanted = existing_gradients(options, output_mask);
  auto& gradients = gradients_;
  if (wanted[kQuery]) problem.grad_query = make_heads_like(gradients[kQuery], query);
  if (wanted[kKey]) problem.grad_key = make_heads_like(gradients[kKey], key);
  if (wanted[kValue]) problem.grad_value = make_heads_like(gradients[kValue], value);
  if (wanted[kAttnMask]) {
    const auto dtype = accumulate_type(query.scalar_type());
    const Tensor sums = on_huge_pages(at::empty(options.attn_mask->sizes(), query.options().dtype(dtype)));
    gradients[kAttnMask] = sums.zero_();
    problem.grad_attn_mask = broadcast_view_of(sums);
  }
  if (wanted[kAlibiSlopes]) {
    problem.grad_alibi_slopes = make_per_head(gradients[kAlibiSlopes], problem, query.options());
  }
  if (wanted[kSinks]) problem.grad_sinks = make_per_head(gradients[kSinks], problem, query.options());
}

void GradientBuffers::zero() const {
  for (const Tensor& gradient : gradients_) {
    if (gradient.defined()) gradient.zero_();
  }
}

ops::Gradients GradientBuffers::results() const {
  size_t i = 0;
  const auto result = [&](const auto& input) {
    const Tensor& gradient = gradients_[i++];
    return gradient.defined() ? like_input(gradient, input) : not_made(std::get<ops::kQuery>(inputs_));
  };
  return std::apply([&](const auto&... input) { return ops::Gradients{result(input)...}; }, inputs_);
}

}  // namespace attention_ext
