#include "torch/weights_derivative.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "core/problem.h"
#include "torch/checks.h"
#include "torch/numbers.h"
#include "torch/own_precision.h"

namespace attention_ext {

namespace {

using at::Tensor;
using c10::SymInt;

bool is_one(const SymInt& size) { return TORCH_GUARD_OR_FALSE(size.sym_eq(1)); }

void add_to(Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum + term : term; }

// Rows of a tensor (..., rows or 1, columns).
Tensor rows_of(const Tensor& tensor, const RowBlock& block) {
  return is_one(tensor.sym_size(-2)) ? tensor : tensor.narrow_symint(-2, block.begin, block.size);
}

// Puts zeros for the rows that the call left out.
Tensor all_rows(const WeightsCall& call, const std::vector<Tensor>& blocks, int64_t dim) {
  const Tensor rows = at::cat(blocks, dim);
  std::vector<SymInt> pad(2 * static_cast<size_t>(rows.dim() - dim), 0);
  pad[pad.size() - 2] = call.row_begin;
  pad[pad.size() - 1] = call.length_q() - call.row_end;
  return at::constant_pad_nd_symint(rows, pad);
}

// (B, H, rows, Lk) summed over the dimensions that the mask broadcasts along.
Tensor sum_like_mask(const Tensor& grad_score, const Tensor& mask) {
  std::vector<int64_t> summed;
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t dim = i - (4 - mask.dim());
    if (dim < 0 || is_one(mask.sym_size(dim))) summed.push_back(i);
  }
  return summed.empty() ? grad_score : grad_score.sum(summed, /*keepdim=*/true);
}

// Also an average over no heads has elements.
bool is_empty(const WeightsCall& call) {
  const SymInt weights = call.query.sym_size(0) * call.query.sym_size(1) * (call.row_end - call.row_begin);
  return TORCH_GUARD_OR_FALSE((weights * call.length_k()).sym_eq(0));
}

Tensor zeros_if(bool wanted, const std::optional<Tensor>& like) { return wanted ? at::zeros_like(*like) : Tensor(); }

}  // namespace

WeightsCall::WeightsCall(const Tensor& query_, const Tensor& key_, const Tensor& logsumexp_, const Tensor& rng_state_,
                         const AttentionOptions& options_, bool average_heads_, const std::optional<SymInt>& row_begin_,
                         const std::optional<SymInt>& row_end_)
    : query(query_.to(accumulate_type(query_.scalar_type()))),
      key(key_.to(query.scalar_type())),
      logsumexp(logsumexp_),
      rng_state(rng_state_),
      options(options_),
      average_heads(average_heads_),
      row_begin(row_begin_.value_or(0)),
      row_end(row_end_.value_or(query_.sym_size(2))),
      dtype(query_.scalar_type()) {
  key = visible(key);
}

Tensor WeightsCall::visible(const Tensor& keys) const {
  if (TORCH_GUARD_OR_FALSE(keys.sym_numel().sym_eq(0))) return keys;
  Tensor shown = options.block_mask ? keys.masked_fill(hidden_by_blocks(), 0) : keys;
  if (!options.key_lengths && !options.is_causal && !options.window_left && !options.window_right) {
    return shown;
  }
  const Tensor k = positions(0, length_k()).unsqueeze(1);
  std::vector<Tensor> hidden;
  if (options.key_lengths) hidden.push_back(k >= options.key_lengths->view({-1, 1, 1, 1}));
  const auto end = [&](const SymInt& q) { return diagonal(at::scalar_tensor(q, k.options())); };
  if (options.is_causal) {
    hidden.push_back(k > end(length_q() - 1));
  } else if (options.window_right) {
    hidden.push_back(k > end(length_q() - 1) + options.window_right->min(kUnlimited));
  }
  if (options.window_left) hidden.push_back(k < end(0) - options.window_left->min(kUnlimited));
  for (const Tensor& some : hidden) shown = shown.masked_fill(some, 0);
  return shown;
}

Tensor WeightsCall::hidden_by_blocks() const {
  Tensor shown = (*options.block_mask != kEmptyBlock).any(-2);
  while (shown.dim() < 3) shown = shown.unsqueeze(0);
  if (!is_one(shown.sym_size(1))) {
    const SymInt kv_heads = key.sym_size(1), group = query.sym_size(1) / kv_heads;
    shown = shown.reshape_symint({shown.sym_size(0), kv_heads, group, shown.sym_size(2)}).any(2);
  }
  const SymInt block_k = (options.block_mask_bits->sym_size(2) * kKeysPerByte).min(length_k());
  const Tensor of_keys = shown.unsqueeze(-1).expand_symint({-1, -1, -1, block_k}).flatten(2);
  return of_keys.narrow_symint(2, 0, length_k()).unsqueeze(-1).logical_not();
}

Tensor WeightsCall::diagonal(const Tensor& q) const {
  Tensor aligned = q + (options.query_offset - options.key_offset);
  if (!is_bottom_right(options)) return aligned;
  return options.key_lengths ? aligned + (options.key_lengths->view({-1, 1, 1, 1}) - length_q())
                             : aligned + (length_k() - length_q());
}

c10::SymFloat WeightsCall::scale() const {
  using c10::SymFloat;
  return options.scale ? SymFloat(*options.scale) : SymFloat(1.0) / SymFloat(query.sym_size(3)).sqrt();
}

std::vector<RowBlock> WeightsCall::blocks() const {
  const SymInt rows = row_end - row_begin;
  const auto known_rows = rows.maybe_as_int(), heads = query.sym_size(1).maybe_as_int();
  if (!average_heads || !known_rows || !heads) return {{row_begin, rows}};  // a tracer fuses by itself
  std::vector<RowBlock> blocks;
  const int64_t size = (*known_rows + *heads - 1) / *heads;
  for (int64_t row = 0; row < *known_rows; row += size) {
    blocks.push_back({row_begin + row, std::min(size, *known_rows - row)});
  }
  return blocks;
}

Tensor WeightsCall::prob(const RowBlock& block) const {
  return ops::attention_weights_forward(query, key, logsumexp, rng_state, options, /*average_heads=*/false, block.begin,
                                        block.begin + block.size);
}

std::vector<SymInt> WeightsCall::score_sizes(const RowBlock& block) const {
  return {query.sym_size(0), query.sym_size(1), block.size, length_k()};
}

Tensor WeightsCall::grouped(const Tensor& rows) const {
  const SymInt group = query.sym_size(1) / key.sym_size(1);
  return rows.reshape_symint({rows.sym_size(0), key.sym_size(1), group * rows.sym_size(2), rows.sym_size(3)});
}

Tensor WeightsCall::ungrouped(const Tensor& rows) const {
  const SymInt group = query.sym_size(1) / key.sym_size(1);
  return rows.reshape_symint({rows.sym_size(0), query.sym_size(1), rows.sym_size(2) / group, rows.sym_size(3)});
}

Tensor WeightsCall::dot(const Tensor& q_rows, const Tensor& k) const {
  return ungrouped(at::matmul(grouped(q_rows), k.transpose(-2, -1)));
}

Tensor WeightsCall::softcap_tanh(const RowBlock& block) const {
  return (dot(rows_of(query, block), key) * (scale() / options.softcap)).tanh();
}

Tensor WeightsCall::softcap_slope(const RowBlock& block) const {
  const Tensor t = softcap_tanh(block);
  return 1 - t * t;
}

// Counted, because arange makes a plain tensor where query is a DTensor.
Tensor WeightsCall::positions(const SymInt& begin, const SymInt& size) const {
  return query.new_ones_symint({size}, query.options().dtype(at::kLong)).cumsum(0) + (begin - 1);
}

Tensor WeightsCall::distance(const RowBlock& block) const {
  const Tensor q = positions(block.begin, block.size).unsqueeze(1);
  return (diagonal(q) - positions(0, length_k())).abs().to(query.scalar_type());
}

Tensor WeightsCall::dot_tangent(const RowBlock& block, const ops::InputTangents& tangents) const {
  const auto dtype = query.scalar_type();
  Tensor tangent;
  if (tangents.query) add_to(tangent, dot(rows_of(tangents.query->to(dtype), block), key));
  if (tangents.key) add_to(tangent, dot(rows_of(query, block), visible(tangents.key->to(dtype))));
  return tangent.defined() ? tangent * scale() : tangent;
}

Tensor WeightsCall::score_tangent(const RowBlock& block, const ops::InputTangents& tangents) const {
  const auto dtype = query.scalar_type();
  Tensor score = dot_tangent(block, tangents);
  if (score.defined() && options.softcap > 0) score = score * softcap_slope(block);
  if (tangents.attn_mask) {
    add_to(score, rows_of(tangents.attn_mask->to(dtype), block).expand_symint(score_sizes(block)));
  }
  if (tangents.alibi_slopes) {
    const Tensor slopes = tangents.alibi_slopes->to(dtype).unsqueeze(-1).unsqueeze(-1);
    add_to(score, (-slopes * distance(block)).expand_symint(score_sizes(block)));
  }
  return score;
}

Tensor WeightsCall::second_score_tangent(const RowBlock& block, const ops::InputTangents& first,
                                         const ops::InputTangents& second) const {
  const auto dtype = query.scalar_type();
  Tensor score;
  for (const auto& [q, k] : {std::tie(first.query, second.key), std::tie(second.query, first.key)}) {
    if (q && k) add_to(score, dot(rows_of(q->to(dtype), block), visible(k->to(dtype))) * scale());
  }
  if (options.softcap <= 0) return score;
  const Tensor dot_first = dot_tangent(block, first), dot_second = dot_tangent(block, second);
  if (!score.defined() && !(dot_first.defined() && dot_second.defined())) return score;
  const Tensor t = softcap_tanh(block), slope = 1 - t * t;
  if (score.defined()) score = score * slope;
  if (dot_first.defined() && dot_second.defined()) {
    add_to(score, t * slope * dot_first * dot_second * (-2 / options.softcap));
  }
  return score;
}

std::vector<Tensor> weights_gradients(const WeightsCall& call, const Tensor& grad, const std::vector<bool>& wanted) {
  const OwnPrecision guard(call.query.device().type());
  const auto& mask = call.options.attn_mask;
  const auto& slopes = call.options.alibi_slopes;
  if (is_empty(call)) {
    return {zeros_if(wanted[0], call.query.to(call.dtype)), zeros_if(wanted[1], call.key.to(call.dtype)),
            zeros_if(wanted[2], call.logsumexp), zeros_if(wanted[3], mask), zeros_if(wanted[4], slopes)};
  }
  const Tensor grad_of_heads = call.average_heads
                                   ? grad.to(call.query.scalar_type()).unsqueeze(1) / call.query.sym_size(1)
                                   : grad.to(call.query.scalar_type());
  const bool mask_has_rows = wanted[3] && !is_one(mask->sym_size(-2));

  std::vector<Tensor> query_rows, logsumexp_rows, mask_rows;
  Tensor grad_key, grad_mask, grad_slopes;
  for (const RowBlock& block : call.blocks()) {
    const Tensor grad_score =
        call.prob(block) * grad_of_heads.narrow_symint(-2, block.begin - call.row_begin, block.size);
    if (wanted[2]) logsumexp_rows.push_back(-grad_score.sum(-1));
    if (mask_has_rows) {
      mask_rows.push_back(sum_like_mask(grad_score, *mask));
    } else if (wanted[3]) {
      add_to(grad_mask, sum_like_mask(grad_score, *mask));
    }
    if (wanted[4]) add_to(grad_slopes, -(grad_score * call.distance(block)).sum({2, 3}));
    if (!wanted[0] && !wanted[1]) continue;
    Tensor grad_dot = grad_score * call.scale();
    if (call.options.softcap > 0) grad_dot = grad_dot * call.softcap_slope(block);
    const Tensor grad_dot_grouped = call.grouped(grad_dot);
    if (wanted[0]) query_rows.push_back(call.ungrouped(at::matmul(grad_dot_grouped, call.key)));
    if (wanted[1]) {
      const Tensor q_rows = call.grouped(rows_of(call.query, block));
      add_to(grad_key, at::matmul(grad_dot_grouped.transpose(-2, -1), q_rows));
    }
  }
  if (mask_has_rows) grad_mask = all_rows(call, mask_rows, 2);
  if (wanted[4] && slopes->dim() == 1) grad_slopes = grad_slopes.sum(0);
  return {wanted[0] ? all_rows(call, query_rows, 2).to(call.dtype) : Tensor(),
          wanted[1] ? grad_key.to(call.dtype) : Tensor(), wanted[2] ? all_rows(call, logsumexp_rows, 2) : Tensor(),
          wanted[3] ? grad_mask.reshape_symint(mask->sym_sizes()).to(mask->scalar_type()) : Tensor(),
          wanted[4] ? grad_slopes.to(slopes->scalar_type()) : Tensor()};
}

Tensor weights_tangent(const WeightsCall& call, const ops::InputTangents& tangents, const Tensor& logsumexp_tangent) {
  const OwnPrecision guard(call.query.device().type());
  if (is_empty(call)) {
    std::vector<SymInt> sizes = call.score_sizes({call.row_begin, call.row_end - call.row_begin});
    if (call.average_heads) sizes.erase(sizes.begin() + 1);
    return at::zeros_symint(sizes, call.query.options().dtype(call.dtype));
  }
  std::vector<Tensor> rows;
  for (const RowBlock& block : call.blocks()) {
    Tensor score = call.score_tangent(block, tangents);
    if (logsumexp_tangent.defined()) {
      add_to(score, -logsumexp_tangent.narrow_symint(2, block.begin, block.size).unsqueeze(-1));
    }
    const Tensor weights = call.prob(block) * score;
    rows.push_back(call.average_heads ? weights.mean(1) : weights);
  }
  return at::cat(rows, -2).to(call.dtype);
}

}  // namespace attention_ext
