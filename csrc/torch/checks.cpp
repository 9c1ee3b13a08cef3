#include "torch/checks.h"

#include "core/sparse_mask.h"
#include "torch/numbers.h"
#include "torch/tensor_checks.h"

namespace attention_ext {

namespace {

using at::Tensor;
using c10::SymInt;

constexpr int64_t kLargestHeadDim = INT32_MAX;  // so that the size of a kernel's tiles cannot overflow

bool is_index(at::ScalarType dtype) { return dtype == at::kInt || dtype == at::kLong; }

// Lengths within a sequence are known from values only: the last two sizes are then checked with them.
void check_mask(const char* op, const char* name, const Sizes& sizes, const Tensor& mask) {
  check_broadcasts(op, name, mask, {sizes.sequences, sizes.heads, sizes.seqlen_q, sizes.seqlen_k},
                   sizes.packed ? 2 : 4);
}

void check_block_mask(const char* op, const Sizes& sizes, const AttentionOptions& options, c10::Device device) {
  TORCH_CHECK(options.block_mask.has_value() == options.block_mask_bits.has_value(), op,
              ": expected `block_mask` and `block_mask_bits` together, got only ",
              options.block_mask ? "`block_mask`" : "`block_mask_bits`");
  if (!options.block_mask) return;
  const Tensor &blocks = *options.block_mask, &bits = *options.block_mask_bits;
  check_tensor(op, "block_mask", blocks, device);
  check_tensor(op, "block_mask_bits", bits, device);
  check_dtype(op, "block_mask", blocks, at::kInt);
  check_dtype(op, "block_mask_bits", bits, at::kByte);
  check_rank(op, "block_mask_bits", bits, "(partial blocks, block_q, block_k / 8)", 3);
  TORCH_SYM_CHECK(bits.sym_size(1).sym_ge(1).sym_and(bits.sym_size(2).sym_ge(1)), op,
                  ": expected `block_mask_bits` to have blocks of at least 1 query and 8 keys, got shape ",
                  bits.sym_sizes());
  const SymInt block_q = bits.sym_size(1), block_k = bits.sym_size(2) * kKeysPerByte;
  const auto own = [&](int64_t dim) { return blocks.dim() < 2 ? SymInt(1) : blocks.sym_size(dim); };
  check_broadcasts(op, "block_mask", blocks, {sizes.sequences, sizes.heads, own(-2), own(-1)}, 2);
  if (sizes.packed) return;
  const SymInt rows = (sizes.seqlen_q + block_q - 1) / block_q, columns = (sizes.seqlen_k + block_k - 1) / block_k;
  TORCH_SYM_CHECK(blocks.sym_size(-2).sym_eq(rows).sym_and(blocks.sym_size(-1).sym_eq(columns)), op,
                  ": expected `block_mask` to have (", rows, ", ", columns, ") blocks of ", block_q, " queries and ",
                  block_k, " keys for the lengths ", sizes.seqlen_q, " and ", sizes.seqlen_k, ", got shape ",
                  blocks.sym_sizes());
}

void check_per_head(const char* op, const char* name, const Sizes& sizes, const Tensor& tensor) {
  check_float(op, name, tensor);
  TORCH_CHECK(tensor.dim() == 1 || tensor.dim() == 2, op, ": expected `", name,
              "` to be of shape (heads,) or (batch, heads), got ", tensor.sym_sizes());
  check_size(op, name, tensor, "number of heads", -1, sizes.heads);
  if (tensor.dim() == 2) check_size(op, name, tensor, "batch size", 0, sizes.sequences);
}

void check_lengths(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK(is_index(tensor.scalar_type()), op, ": expected `", name, "` to be of dtype int32 or int64, got ",
              dtype_name(tensor.scalar_type()));
  TORCH_CHECK(tensor.dim() == 1, op, ": expected `", name, "` to be 1-D, got ", tensor.dim(), "-D");
}

// Sets how many sequences there are.
void check_structure(const char* op, Sizes& sizes, const AttentionOptions& options, c10::Device device) {
  sizes.sequences = sizes.batch;
  sizes.packed = options.cu_seqlens_q.has_value();
  TORCH_CHECK(sizes.packed == options.cu_seqlens_k.has_value(), op,
              ": expected `cu_seqlens_q` and `cu_seqlens_k` together, got only ",
              sizes.packed ? "`cu_seqlens_q`" : "`cu_seqlens_k`");
  if (options.key_lengths) {
    TORCH_CHECK(!sizes.packed, op, ": expected `key_lengths` or `cu_seqlens_k`, got both");
    check_tensor(op, "key_lengths", *options.key_lengths, device);
    check_lengths(op, "key_lengths", *options.key_lengths);
    check_size(op, "key_lengths", *options.key_lengths, "size", 0, sizes.batch);
  }
  if (!sizes.packed) return;
  const Tensor &cu_q = *options.cu_seqlens_q, &cu_k = *options.cu_seqlens_k;
  check_tensor(op, "cu_seqlens_q", cu_q, device);
  check_tensor(op, "cu_seqlens_k", cu_k, device);
  check_lengths(op, "cu_seqlens_q", cu_q);
  check_lengths(op, "cu_seqlens_k", cu_k);
  TORCH_SYM_CHECK(cu_q.sym_size(0).sym_ge(1), op, ": expected `cu_seqlens_q` to have at least one element, got none");
  check_size(op, "cu_seqlens_k", cu_k, "the size of `cu_seqlens_q`,", 0, cu_q.sym_size(0));
  TORCH_SYM_CHECK(sizes.batch.sym_eq(1), op, ": expected `query` to have batch size 1 with `cu_seqlens_q`, got ",
                  sizes.batch);
  sizes.sequences = cu_q.sym_size(0) - 1;
}

void check_logsumexp(const char* op, const char* name, const Sizes& sizes, const Tensor& query,
                     const Tensor& logsumexp) {
  check_tensor(op, name, logsumexp, query.device());
  check_dtype(op, name, logsumexp, accumulate_type(query.scalar_type()));
  check_shape(op, name, logsumexp, {sizes.batch, sizes.heads, sizes.seqlen_q});
}

void check_like_out(const char* op, const char* name, const Sizes& sizes, const Tensor& query, const Tensor& tensor) {
  check_tensor(op, name, tensor, query.device());
  check_dtype(op, name, tensor, query.scalar_type());
  check_shape(op, name, tensor, {sizes.batch, sizes.heads, sizes.seqlen_q, sizes.head_dim_v});
}

}  // namespace

Sizes check_attention(const char* op, const Tensor& query, const Tensor& key, const Tensor* value,
                      const AttentionOptions& options) {
  const c10::Device device = query.device();
  check_tensor(op, "query", query, device);
  check_tensor(op, "key", key, device);
  check_float(op, "query", query);
  check_dtype(op, "key", key, query.scalar_type());
  check_rank(op, "query", query, "(batch, heads, length, head_dim)", 4);
  check_rank(op, "key", key, "(batch, heads, length, head_dim)", 4);

  Sizes sizes{query.sym_size(0),
              query.sym_size(1),
              key.sym_size(1),
              query.sym_size(2),
              key.sym_size(2),
              query.sym_size(3),
              0,
              0};
  check_size(op, "key", key, "batch size", 0, sizes.batch);
  check_size(op, "key", key, "head_dim", 3, sizes.head_dim);
  TORCH_SYM_CHECK(sizes.head_dim.sym_ge(1).sym_and(sizes.head_dim.sym_le(kLargestHeadDim)), op,
                  ": expected `query` to have head_dim from 1 to ", kLargestHeadDim, ", got ", sizes.head_dim);
  if (value) {
    check_tensor(op, "value", *value, device);
    check_dtype(op, "value", *value, query.scalar_type());
    check_rank(op, "value", *value, "(batch, heads, length, head_dim_v)", 4);
    check_size(op, "value", *value, "batch size", 0, sizes.batch);
    check_size(op, "value", *value, "the number of heads of `key`,", 1, sizes.kv_heads);
    check_size(op, "value", *value, "the length of `key`,", 2, sizes.seqlen_k);
    sizes.head_dim_v = value->sym_size(3);
    TORCH_SYM_CHECK(sizes.head_dim_v.sym_le(kLargestHeadDim), op, ": expected `value` to have head_dim_v up to ",
                    kLargestHeadDim, ", got ", sizes.head_dim_v);
  }
  if (options.enable_gqa) {
    TORCH_SYM_CHECK(sizes.heads.sym_eq(0).sym_or(sizes.kv_heads.sym_ge(1)), op,
                    ": expected `key` to have at least one head, got none");
    TORCH_SYM_CHECK(sizes.heads.sym_eq(0).sym_or((sizes.heads % sizes.kv_heads.max(1)).sym_eq(0)), op,
                    ": expected `query` to have a multiple of the ", sizes.kv_heads, " heads of `key`, got ",
                    sizes.heads);
  } else {
    TORCH_SYM_CHECK(sizes.kv_heads.sym_eq(sizes.heads), op, ": expected `key` to have as many heads as `query`, ",
                    sizes.heads, " (`enable_gqa` allows fewer), got ", sizes.kv_heads);
  }

  check_numbers(op, options, device);
  check_structure(op, sizes, options, device);
  if (options.attn_mask) {
    const Tensor& mask = *options.attn_mask;
    check_tensor(op, "attn_mask", mask, device);
    TORCH_CHECK(mask.scalar_type() == at::kBool || is_float(mask.scalar_type()), op,
                ": expected `attn_mask` to be of dtype bool, float32, bfloat16, float16 or float64, got ",
                dtype_name(mask.scalar_type()));
    check_mask(op, "attn_mask", sizes, mask);
  }
  check_block_mask(op, sizes, options, device);
  if (options.alibi_slopes) {
    check_tensor(op, "alibi_slopes", *options.alibi_slopes, device);
    check_per_head(op, "alibi_slopes", sizes, *options.alibi_slopes);
  }
  if (options.sinks) {
    check_tensor(op, "sinks", *options.sinks, device);
    check_per_head(op, "sinks", sizes, *options.sinks);
  }
  return sizes;
}

namespace {

void check_rng_state(const char* op, const Tensor& rng_state, const AttentionOptions& options, c10::Device device) {
  check_tensor(op, "rng_state", rng_state, device);
  check_dtype(op, "rng_state", rng_state, at::kLong);
  if (options.dropout_p == 0) return;
  TORCH_CHECK(rng_state.dim() == 1 && (rng_state.sym_size(0) == 2 || rng_state.sym_size(0) == 4), op,
              ": expected `rng_state` to be of shape [2], or [4] for a shard of the heads, got ",
              rng_state.sym_sizes());
}

void check_saved(const char* op, const Sizes& sizes, const Tensor& query, const Tensor& out, const Tensor& logsumexp,
                 const Tensor& rng_state, const AttentionOptions& options) {
  check_like_out(op, "out", sizes, query, out);
  check_logsumexp(op, "logsumexp", sizes, query, logsumexp);
  check_rng_state(op, rng_state, options, query.device());
}

void check_grads(const char* op, const Sizes& sizes, const Tensor& grad_out,
                 const std::optional<Tensor>& grad_logsumexp, const Tensor& query) {
  check_like_out(op, "grad_out", sizes, query, grad_out);
  if (grad_logsumexp) check_logsumexp(op, "grad_logsumexp", sizes, query, *grad_logsumexp);
}

void check_tangents(const char* op, const Sizes& sizes, const ops::InputTangents& tangents, const Tensor& query,
                    const Tensor& key, const Tensor& value, const AttentionOptions& options) {
  const auto check_like = [&](const char* name, const std::optional<Tensor>& tangent, const Tensor& input) {
    if (!tangent) return;
    check_tensor(op, name, *tangent, query.device());
    check_dtype(op, name, *tangent, query.scalar_type());
    check_shape(op, name, *tangent, {input.sym_size(0), input.sym_size(1), input.sym_size(2), input.sym_size(3)});
  };
  check_like("query_tangent", tangents.query, query);
  check_like("key_tangent", tangents.key, key);
  check_like("value_tangent", tangents.value, value);
  if (tangents.attn_mask) {
    TORCH_CHECK(options.attn_mask && is_float(options.attn_mask->scalar_type()), op,
                ": expected `attn_mask_tangent` with a floating `attn_mask` only, got one without");
    check_tensor(op, "attn_mask_tangent", *tangents.attn_mask, query.device());
    check_float(op, "attn_mask_tangent", *tangents.attn_mask);
    check_mask(op, "attn_mask_tangent", sizes, *tangents.attn_mask);
  }
  const auto check_heads = [&](const char* name, const std::optional<Tensor>& tangent, bool has_input) {
    if (!tangent) return;
    TORCH_CHECK(has_input, op, ": expected no `", name, "` without the input that it belongs to, got one");
    check_tensor(op, name, *tangent, query.device());
    check_per_head(op, name, sizes, *tangent);
  };
  check_heads("alibi_slopes_tangent", tangents.alibi_slopes, options.alibi_slopes.has_value());
  check_heads("sinks_tangent", tangents.sinks, options.sinks.has_value());
}

}  // namespace

Sizes check_forward(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                    const AttentionOptions& options, const std::optional<Tensor>& rng_state) {
  Sizes sizes = check_attention(op, query, key, &value, options);
  if (rng_state) check_rng_state(op, *rng_state, options, query.device());
  return sizes;
}

Sizes check_backward(const char* op, const Tensor& grad_out, const std::optional<Tensor>& grad_logsumexp,
                     const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                     const Tensor& logsumexp, const Tensor& rng_state, const AttentionOptions& options) {
  Sizes sizes = check_attention(op, query, key, &value, options);
  check_saved(op, sizes, query, out, logsumexp, rng_state, options);
  check_grads(op, sizes, grad_out, grad_logsumexp, query);
  return sizes;
}

Sizes check_jvp(const char* op, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                const Tensor& logsumexp, const Tensor& rng_state, const ops::InputTangents& tangents,
                const AttentionOptions& options) {
  Sizes sizes = check_attention(op, query, key, &value, options);
  check_saved(op, sizes, query, out, logsumexp, rng_state, options);
  check_tangents(op, sizes, tangents, query, key, value, options);
  return sizes;
}

Sizes check_double_backward(const char* op, const ops::InputTangents& tangents, const Tensor& grad_out,
                            const std::optional<Tensor>& grad_logsumexp, const Tensor& query, const Tensor& key,
                            const Tensor& value, const Tensor& out, const Tensor& logsumexp, const Tensor& rng_state,
                            const AttentionOptions& options) {
  Sizes sizes = check_backward(op, grad_out, grad_logsumexp, query, key, value, out, logsumexp, rng_state, options);
  check_tangents(op, sizes, tangents, query, key, value, options);
  return sizes;
}

Rows check_weights(const char* op, const Sizes& sizes, const Tensor& query, const Tensor& logsumexp,
                   const Tensor& rng_state, const AttentionOptions& options, const std::optional<SymInt>& row_begin,
                   const std::optional<SymInt>& row_end) {
  TORCH_CHECK(!sizes.packed, op, ": expected no `cu_seqlens_q`: weights of packed sequences are not offered, got one");
  check_logsumexp(op, "logsumexp", sizes, query, logsumexp);
  check_rng_state(op, rng_state, options, query.device());
  Rows rows{row_begin.value_or(0), row_end.value_or(sizes.seqlen_q)};
  TORCH_SYM_CHECK(rows.begin.sym_ge(0).sym_and(rows.begin.sym_le(rows.end)).sym_and(rows.end.sym_le(sizes.seqlen_q)),
                  op, ": expected `row_begin` and `row_end` to be a range within the ", sizes.seqlen_q,
                  " queries, got ", rows.begin, " to ", rows.end);
  return rows;
}

}  // namespace attention_ext
