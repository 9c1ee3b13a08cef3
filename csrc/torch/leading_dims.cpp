#include "torch/leading_dims.h"

#include <algorithm>

namespace attention_ext {

namespace {

using at::Tensor;
using c10::SymDimVector;
using c10::SymInt;
using c10::SymIntArrayRef;

constexpr size_t kInner = 3;  // heads, length and head_dim come after the leading dimensions

bool is_dense(const Tensor& tensor) {
  return tensor.defined() && tensor.layout() == at::kStrided && !tensor.is_nested();
}

// With dimensions of size 1 put in front until there are `rank`.
Tensor at_rank(Tensor tensor, int64_t rank) {
  while (tensor.dim() < rank) tensor = tensor.unsqueeze(0);
  return tensor;
}

SymIntArrayRef leading_sizes(const Tensor& tensor, size_t inner) {
  return tensor.sym_sizes().slice(0, tensor.sym_sizes().size() - inner);
}

SymIntArrayRef last_sizes(const Tensor& tensor, size_t inner) {
  return tensor.sym_sizes().slice(tensor.sym_sizes().size() - inner);
}

SymDimVector broadcast_sizes(const char* op, SymIntArrayRef query, SymIntArrayRef key, SymIntArrayRef value) {
  SymDimVector sizes;
  for (size_t i = 0; i < query.size(); ++i) {
    const SymInt& size = query[i] != 1 ? query[i] : key[i] != 1 ? key[i] : value[i];
    for (const SymInt* other : {&query[i], &key[i], &value[i]}) {
      TORCH_CHECK(*other == size || *other == 1, op,
                  ": expected the leading dimensions of `query`, `key` and `value` to broadcast, got ", query, ", ",
                  key, " and ", value);
    }
    sizes.push_back(size);
  }
  return sizes;
}

SymDimVector joined(const SymDimVector& leading, SymIntArrayRef inner) {
  SymDimVector sizes(leading);
  sizes.append(inner.begin(), inner.end());
  return sizes;
}

void check_leading(const char* op, const char* name, SymIntArrayRef sizes, const SymDimVector& batch) {
  bool broadcasts = sizes.size() <= batch.size();
  for (size_t i = 0; broadcasts && i < sizes.size(); ++i) {
    broadcasts = sizes[i] == 1 || sizes[i] == batch[batch.size() - sizes.size() + i];
  }
  TORCH_CHECK(broadcasts, op, ": expected the leading dimensions of `", name, "` to broadcast to ",
              SymIntArrayRef(batch), ", got ", sizes);
}

// (..., H or 1, L, D) to (B, H, L, D)
Tensor fold_heads(const Tensor& tensor, const SymDimVector& batch, const SymInt& heads) {
  SymDimVector inner(last_sizes(tensor, kInner));
  if (inner[0] == 1) inner[0] = heads;
  return tensor.expand_symint(joined(batch, inner)).flatten(0, -4);
}

// Broadcasts to (*batch, H, L, S), then to (B, H, L, S), or with blocks of L and S. Only a mask that differs along some
// but not all of several leading dimensions is copied.
Tensor fold_mask(const char* op, const char* name, const Tensor& mask, const SymDimVector& batch) {
  if (batch.size() < 2 || mask.dim() < 4) return at_rank(mask, 2);
  const SymIntArrayRef leading = leading_sizes(mask, kInner), inner = last_sizes(mask, kInner);
  check_leading(op, name, leading, batch);
  const bool is_shared = std::all_of(leading.begin(), leading.end(), [](const SymInt& size) { return size == 1; });
  if (is_shared) return mask.reshape_symint(joined({1}, inner));
  return mask.expand_symint(joined(batch, inner)).flatten(0, -4);
}

// (H,) stays; (*batch, H) becomes (B, H).
Tensor fold_per_head(const char* op, const char* name, const Tensor& per_head, const SymDimVector& batch) {
  if (per_head.dim() < 2) return per_head;
  check_leading(op, name, leading_sizes(per_head, 1), batch);
  return per_head.expand_symint(joined(batch, last_sizes(per_head, 1))).flatten(0, -2);
}

// (*batch,) becomes (B,).
Tensor fold_lengths(const char* op, const Tensor& key_lengths, const SymDimVector& batch) {
  check_leading(op, "key_lengths", key_lengths.sym_sizes(), batch);
  return key_lengths.expand_symint(batch).flatten();
}

}  // namespace

bool needs_folding(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options) {
  if (!is_dense(query) || !is_dense(key) || !is_dense(value)) return false;
  if (options.attn_mask && options.attn_mask->dim() < 2) return true;
  if (query.dim() != 4 || key.dim() != 4 || value.dim() != 4) return true;
  // Lengths are not compared: a traced graph would be tied to the outcome.
  const auto differ = [&](int64_t dim) {
    return query.sym_size(dim) != key.sym_size(dim) || query.sym_size(dim) != value.sym_size(dim);
  };
  return differ(0) || (!options.enable_gqa && differ(1));
}

FoldedCall::FoldedCall(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& given)
    : options(given), rank(std::max({q.dim(), k.dim(), v.dim()})) {
  TORCH_CHECK(q.dim() >= 2 && k.dim() >= 2 && v.dim() >= 2, op,
              ": expected `query`, `key` and `value` to have at least 2 dimensions (length, head_dim), got ", q.dim(),
              ", ", k.dim(), " and ", v.dim());
  const int64_t common = std::max<int64_t>(rank, 4);
  query = at_rank(q, common);
  key = at_rank(k, common);
  value = at_rank(v, common);
  batch_ = broadcast_sizes(op, leading_sizes(query, kInner), leading_sizes(key, kInner), leading_sizes(value, kInner));

  const auto heads_of = [](const Tensor& tensor) { return tensor.sym_size(-3); };
  options.enable_gqa = given.enable_gqa || (heads_of(key) == 1 && heads_of(value) == 1);
  // Numbers of heads that do not broadcast are left to the operator, which names them.
  const SymInt heads = options.enable_gqa ? SymInt(1) : heads_of(query).max(heads_of(key)).max(heads_of(value));
  query = fold_heads(query, batch_, heads);
  key = fold_heads(key, batch_, heads);
  value = fold_heads(value, batch_, heads);

  if (given.attn_mask) options.attn_mask = fold_mask(op, "attn_mask", *given.attn_mask, batch_);
  if (given.block_mask) options.block_mask = fold_mask(op, "block_mask", *given.block_mask, batch_);
  if (given.cu_seqlens_q || given.cu_seqlens_k) return;  // the rest is per sequence, not per batch entry
  if (given.alibi_slopes) options.alibi_slopes = fold_per_head(op, "alibi_slopes", *given.alibi_slopes, batch_);
  if (given.sinks) options.sinks = fold_per_head(op, "sinks", *given.sinks, batch_);
  if (given.key_lengths) options.key_lengths = fold_lengths(op, *given.key_lengths, batch_);
}

c10::SymDimVector FoldedCall::unfolded_sizes(SymIntArrayRef sizes, int64_t result_rank) const {
  const SymDimVector all = joined(batch_, sizes.slice(1));
  return {all.end() - result_rank, all.end()};
}

Tensor FoldedCall::unfold(const Tensor& result, int64_t result_rank) const {
  return result.reshape_symint(unfolded_sizes(result.sym_sizes(), result_rank));
}

}  // namespace attention_ext
