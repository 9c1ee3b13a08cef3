#include "torch/problem.h"

#include <ATen/Context.h>

#include <algorithm>

#include "torch/device.h"
#include "torch/numbers.h"

namespace attention_ext {

namespace {

using at::Tensor;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBool:
      return DType::kBool;
    default:
      return DType::kFloat32;
  }
}

const Tensor& keep_as(at::ScalarType dtype, const Tensor& tensor, Converted& converted) {
  return converted.emplace_back(tensor.to(dtype).contiguous());
}

const double* per_head(const Tensor& tensor, Converted& converted, int64_t& stride_b) {
  stride_b = tensor.dim() == 2 ? tensor.size(1) : 0;
  return keep_as(at::kDouble, tensor, converted).const_data_ptr<double>();
}

void verify_key_lengths(const char* op, const AttentionProblem& problem) {
  for (int64_t b = 0; b < problem.batch; ++b) {
    TORCH_CHECK(problem.key_lengths[b] >= 0 && problem.key_lengths[b] <= problem.seqlen_k, op,
                ": expected `key_lengths` to be from 0 to ", problem.seqlen_k, ", got ", problem.key_lengths[b],
                " at index ", b);
  }
}

// The longest sequence.
int64_t verify_cu_seqlens(const char* op, const char* name, const int64_t* cu, int64_t sequences, int64_t total) {
  TORCH_CHECK(cu[0] == 0, op, ": expected `", name, "` to start with 0, got ", cu[0]);
  int64_t longest = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    TORCH_CHECK(cu[i] <= cu[i + 1], op, ": expected `", name, "` to be non-decreasing, got ", cu[i], " then ",
                cu[i + 1], " at index ", i + 1);
    longest = std::max(longest, cu[i + 1] - cu[i]);
  }
  TORCH_CHECK(cu[sequences] <= total, op, ": expected `", name, "` to end with at most the packed length ", total,
              ", got ", cu[sequences]);
  return longest;
}

// Where lengths cannot be read without waiting for the device: shapes bound them. dim: -2 of queries, -1 of keys
int64_t longest_by_shape(int64_t total, const AttentionOptions& options, int64_t dim) {
  if (options.attn_mask && options.attn_mask->size(dim) != 1) total = std::min(total, options.attn_mask->size(dim));
  if (!options.block_mask) return total;
  const Tensor& bits = *options.block_mask_bits;
  const int64_t size = dim == -2 ? bits.size(1) : bits.size(2) * kKeysPerByte;
  return std::min(total, options.block_mask->size(dim) * size);
}

void verify_packed_mask(const char* op, const char* name, const AttentionProblem& problem, const Tensor& mask) {
  const int64_t longest[2] = {problem.max_seqlen_q, problem.max_seqlen_k};
  for (int64_t i = 0; i < 2; ++i) {
    const int64_t size = mask.size(i - 2);
    TORCH_CHECK(size == 1 || size >= longest[i], op, ": expected `", name,
                "` to reach the longest sequence in its last two sizes, ", longest[0], " and ", longest[1],
                ", got shape ", mask.sizes());
  }
}

// Kernels add a mask of the problem's own precision, or of any narrower one; others are converted, without the copies
// that a broadcast stands for.
Tensor readable_mask(const Tensor& mask, const AttentionProblem& problem) {
  const bool wide = problem.dtype == DType::kFloat64;
  if (mask.scalar_type() == at::kBool || (mask.scalar_type() == at::kDouble) == wide) return mask;
  Tensor once = mask;
  for (int64_t i = 0; i < mask.dim(); ++i) {
    if (mask.stride(i) == 0 && mask.size(i) > 1) once = once.narrow(i, 0, 1);
  }
  return once.to(wide ? at::kDouble : at::kFloat);
}

// Entries that a broadcast repeats are read once.
void verify_blocks(const char* op, const SparseMask& mask, int64_t partial, const Tensor& blocks) {
  const auto distinct = [&](int64_t stride, int64_t dim) { return stride == 0 ? 1 : blocks.size(dim); };
  for (int64_t b = 0; b < distinct(mask.stride_b, 0); ++b) {
    for (int64_t h = 0; h < distinct(mask.stride_h, 1); ++h) {
      for (int64_t q = 0; q < blocks.size(2); ++q) {
        const int32_t* row = mask.row(b, h, q);
        for (int64_t k = 0; k < blocks.size(3); ++k) {
          TORCH_CHECK(row[k] >= kFullBlock && row[k] < partial, op,
                      ": expected `block_mask` to hold -2 (full), -1 (empty) or which of the ", partial,
                      " blocks of `block_mask_bits`, got ", row[k], " at (", b, ", ", h, ", ", q, ", ", k, ")");
        }
      }
    }
  }
}

void fill_sparse_mask(AttentionProblem& problem, Converted& converted, const char* op,
                      const AttentionOptions& options) {
  const Tensor bits = options.block_mask_bits->contiguous();
  Tensor blocks = *options.block_mask;
  while (blocks.dim() < 4) blocks = blocks.unsqueeze(0);
  if (blocks.size(3) != 1 && blocks.stride(3) != 1) blocks = blocks.contiguous();
  converted.insert(converted.end(), {bits, blocks});
  SparseMask& mask = problem.sparse_mask;
  const auto stride = [&](int64_t dim) { return blocks.size(dim) == 1 ? 0 : blocks.stride(dim); };
  mask = {blocks.const_data_ptr<int32_t>(),
          stride(0),
          stride(1),
          blocks.stride(2),
          bits.const_data_ptr<uint8_t>(),
          bits.size(1),
          bits.size(2) * kKeysPerByte,
          bits.size(0)};
  const int64_t rows = ceil_div(problem.max_seqlen_q, mask.block_q);
  const int64_t columns = ceil_div(problem.max_seqlen_k, mask.block_k);
  TORCH_CHECK(blocks.size(2) >= rows && blocks.size(3) >= columns, op,
              ": expected `block_mask` to reach the longest sequence by (", rows, ", ", columns, ") blocks of ",
              mask.block_q, " queries and ", mask.block_k, " keys, got shape ", options.block_mask->sizes());
  if (blocks.is_cpu()) verify_blocks(op, mask, bits.size(0), blocks);
}

void fill_structure(AttentionProblem& problem, Converted& converted, const char* op, const AttentionOptions& options) {
  if (options.key_lengths) {
    problem.key_lengths = keep_as(at::kLong, *options.key_lengths, converted).const_data_ptr<int64_t>();
    if (options.key_lengths->is_cpu()) verify_key_lengths(op, problem);
  }
  if (!options.cu_seqlens_q) return;
  problem.cu_seqlens_q = keep_as(at::kLong, *options.cu_seqlens_q, converted).const_data_ptr<int64_t>();
  problem.cu_seqlens_k = keep_as(at::kLong, *options.cu_seqlens_k, converted).const_data_ptr<int64_t>();
  if (options.cu_seqlens_q->is_cpu()) {
    problem.max_seqlen_q = verify_cu_seqlens(op, "cu_seqlens_q", problem.cu_seqlens_q, problem.batch, problem.seqlen_q);
    problem.max_seqlen_k = verify_cu_seqlens(op, "cu_seqlens_k", problem.cu_seqlens_k, problem.batch, problem.seqlen_k);
  } else {
    problem.max_seqlen_q = longest_by_shape(problem.seqlen_q, options, -2);
    problem.max_seqlen_k = longest_by_shape(problem.seqlen_k, options, -1);
  }
  if (options.attn_mask) verify_packed_mask(op, "attn_mask", problem, *options.attn_mask);
}

// The setting of torch's own products, whichever of its switches made it; Context::allowTF32CuBLAS raises after some of
// them.
bool allows_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

}  // namespace

View view_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {const_cast<void*>(tensor.const_data_ptr()), dtype_of(tensor), strides[0], strides[1], strides[2], strides[3]};
}

View broadcast_view_of(const Tensor& tensor) {
  int64_t strides[4] = {0, 0, 0, 0};
  const int64_t missing = 4 - tensor.dim();
  for (int64_t i = missing; i < 4; ++i) {
    if (tensor.size(i - missing) != 1) strides[i] = tensor.stride(i - missing);
  }
  return {const_cast<void*>(tensor.const_data_ptr()), dtype_of(tensor), strides[0], strides[1], strides[2], strides[3]};
}

const void* contiguous_data(const Tensor& tensor, Converted& converted) {
  if (tensor.is_contiguous()) return tensor.const_data_ptr();
  return converted.emplace_back(tensor.contiguous()).const_data_ptr();
}

void fill_problem(AttentionProblem& problem, Converted& converted, const char* op, const Sizes& sizes,
                  const Tensor& query, const Tensor& key, const Tensor* value, const Tensor* rng_state,
                  const AttentionOptions& options) {
  problem.batch = sizes.sequences.expect_int();
  problem.heads = sizes.heads.expect_int();
  problem.kv_heads = sizes.kv_heads.expect_int();
  problem.seqlen_q = problem.max_seqlen_q = sizes.seqlen_q.expect_int();
  problem.seqlen_k = problem.max_seqlen_k = sizes.seqlen_k.expect_int();
  problem.head_dim = sizes.head_dim.expect_int();
  problem.head_dim_v = sizes.head_dim_v.expect_int();
  problem.dtype = dtype_of(query);
  problem.allow_tf32 = query.is_cuda() && allows_tf32();
  const Device& device = device_for(query.device().type());
  problem.multiprocessors = device.multiprocessors();
  problem.l2_bytes = device.l2_bytes();
  problem.key_parts = key_parts();
  problem.query = view_of(query);
  problem.key = view_of(key);
  if (value) problem.value = view_of(*value);

  fill_numbers(problem, options);
  if (options.attn_mask) {
    problem.attn_mask = broadcast_view_of(converted.emplace_back(readable_mask(*options.attn_mask, problem)));
  }
  if (options.alibi_slopes) {
    problem.alibi_slopes = per_head(*options.alibi_slopes, converted, problem.alibi_stride_b);
  }
  if (options.sinks) problem.sinks = per_head(*options.sinks, converted, problem.sinks_stride_b);
  fill_structure(problem, converted, op, options);
  if (options.block_mask) fill_sparse_mask(problem, converted, op, options);

  if (options.dropout_p > 0 && rng_state) {
    problem.rng_state = static_cast<const int64_t*>(contiguous_data(*rng_state, converted));
    problem.shards_heads = rng_state->size(0) == 4;
  }
}

void fill_tangents(Tangents& filled, Converted& converted, const char* op, const AttentionProblem& problem,
                   const ops::InputTangents& tangents) {
  if (tangents.query) filled.query = view_of(*tangents.query);
  if (tangents.key) filled.key = view_of(*tangents.key);
  if (tangents.value) filled.value = view_of(*tangents.value);
  if (tangents.attn_mask) {
    const Tensor& mask = converted.emplace_back(readable_mask(*tangents.attn_mask, problem));
    if (problem.cu_seqlens_q) verify_packed_mask(op, "attn_mask_tangent", problem, mask);
    filled.attn_mask = broadcast_view_of(mask);
  }
  const auto per_sequence = [&](const Tensor& tensor) {
    const Tensor all = tensor.to(at::kDouble).expand({problem.batch, problem.heads});
    return converted.emplace_back(all.contiguous()).const_data_ptr<double>();
  };
  if (tangents.alibi_slopes) filled.alibi_slopes = per_sequence(*tangents.alibi_slopes);
  if (tangents.sinks) filled.sinks = per_sequence(*tangents.sinks);
}

}  // namespace attention_ext
