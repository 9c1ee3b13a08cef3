#include "torch/outputs.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include "torch/huge_pages.h"

namespace attention_ext {

using at::Tensor;
using c10::SymInt;

Tensor empty_heads(const Tensor& query, const SymInt& batch, const SymInt& heads, const SymInt& length,
                   const SymInt& head_dim) {
  const SymInt sizes[4] = {batch, heads, length, head_dim};
  const SymInt row = heads * head_dim;
  const SymInt strides[4] = {length * row, head_dim, row, 1};
  return on_huge_pages(at::empty_strided_symint({sizes, 4}, {strides, 4}, query.options()));
}

namespace {

Tensor empty_logsumexp(const Tensor& query, const Sizes& sizes) {
  const SymInt rows[3] = {sizes.batch, sizes.heads, sizes.seqlen_q};
  return at::empty_symint({rows, 3}, query.options().dtype(accumulate_type(query.scalar_type())));
}

}  // namespace

Tensor empty_rng_state(const Tensor& query, const AttentionOptions& options) {
  return at::empty({options.dropout_p > 0 ? 2 : 0}, query.options().dtype(at::kLong));
}

ops::Forward empty_forward(const Tensor& query, const Sizes& sizes, const Tensor& rng_state) {
  return {empty_heads(query, sizes.batch, sizes.heads, sizes.seqlen_q, sizes.head_dim_v), empty_logsumexp(query, sizes),
          rng_state};
}

ops::OutputTangents empty_tangents(const Tensor& query, const Sizes& sizes, bool compute_out_tangent) {
  return {compute_out_tangent ? empty_heads(query, sizes.batch, sizes.heads, sizes.seqlen_q, sizes.head_dim_v)
                              : not_made(query),
          empty_logsumexp(query, sizes)};
}

ops::OutputMask existing_gradients(const AttentionOptions& options, ops::OutputMask output_mask) {
  size_t i = ops::kAttnMask;
  const auto restrict_to = [&](const std::optional<Tensor>& input) {
    output_mask[i] = output_mask[i] && input && input->scalar_type() != at::kBool;
    ++i;
  };
  std::apply([&](const auto&... input) { (restrict_to(input), ...); }, options.differentiable());
  return output_mask;
}

Tensor not_made(const Tensor& query) { return at::empty({0}, query.options()); }

Tensor empty_weights(const Tensor& query, const Sizes& sizes, bool average_heads, const Rows& rows) {
  const SymInt full[4] = {sizes.batch, sizes.heads, rows.end - rows.begin, sizes.seqlen_k};
  const SymInt averaged[3] = {full[0], full[2], full[3]};
  return on_huge_pages(average_heads ? at::empty_symint({averaged, 3}, query.options())
                                     : at::empty_symint({full, 4}, query.options()));
}

}  // namespace attention_ext
