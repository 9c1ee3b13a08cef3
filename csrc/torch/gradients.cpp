#include "torch/gradients.h"

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

Tensor sum_per_head(const Tensor& sums, const Tensor& argument) {
  return (argument.dim() == 1 ? sums.sum(0) : sums).to(argument.scalar_type());
}

Tensor cast(const Tensor& gradient, at::ScalarType dtype) {
  if (gradient.scalar_type() == dtype) return gradient;
  return on_huge_pages(at::empty(gradient.sizes(), gradient.options().dtype(dtype))).copy_(gradient);
}

}  // namespace

GradientBuffers::GradientBuffers(BackwardProblem& problem, const Tensor& query, const Tensor& key, const Tensor& value,
                                 const AttentionOptions& options, const ops::OutputMask& output_mask)
    : query_input_(query), options_(options) {
  const auto wanted = existing_gradients(options, output_mask);
  if (wanted[ops::kQuery]) problem.grad_query = make_heads_like(query_, query);
  if (wanted[ops::kKey]) problem.grad_key = make_heads_like(key_, key);
  if (wanted[ops::kValue]) problem.grad_value = make_heads_like(value_, value);
  if (wanted[ops::kAttnMask]) {
    const auto dtype = accumulate_type(query.scalar_type());
    mask_ = on_huge_pages(at::empty(options.attn_mask->sizes(), query.options().dtype(dtype))).zero_();
    problem.grad_attn_mask = broadcast_view_of(mask_);
  }
  if (wanted[ops::kAlibiSlopes]) problem.grad_alibi_slopes = make_per_head(slopes_, problem, query.options());
  if (wanted[ops::kSinks]) problem.grad_sinks = make_per_head(sinks_, problem, query.options());
}

void GradientBuffers::zero() const {
  for (const Tensor* gradient : {&query_, &key_, &value_}) {
    if (gradient->defined()) gradient->zero_();
  }
}

ops::Gradients GradientBuffers::results() const {
  const auto or_none = [&](const Tensor& gradient) { return gradient.defined() ? gradient : not_made(query_input_); };
  return {or_none(query_),
          or_none(key_),
          or_none(value_),
          or_none(mask_.defined() ? cast(mask_, options_.attn_mask->scalar_type()) : mask_),
          or_none(slopes_.defined() ? sum_per_head(slopes_, *options_.alibi_slopes) : slopes_),
          or_none(sinks_.defined() ? sum_per_head(sinks_, *options_.sinks) : sinks_)};
}

}  // namespace attention_ext
