// Why a kernel does not serve a problem, for the rows of both tables.
#pragma once

#include "core/problem.h"

namespace attention_ext {

inline const char* serves_every_problem(const AttentionProblem&) { return nullptr; }

// Kernels count rows and columns, and those of some tiles more, as int, and a launch its blocks of threads.
constexpr int64_t kMostRows = INT32_MAX / 2, kMostBlocks = INT32_MAX;

inline const char* beyond_count(const AttentionProblem& p) {
  if (p.score_mod) return "has no compiled score_mod";
  if (maximum(p.max_seqlen_q, p.max_seqlen_k) > kMostRows) return "serves sequences of up to 2^30 - 1 queries and keys";
  if (maximum(p.sparse_mask.block_q, p.sparse_mask.block_k) > kMostRows) {
    return "serves blocks of up to 2^30 - 1 queries and keys";
  }
  if (maximum(p.head_dim, p.head_dim_v) > kMostRows) return "serves head_dim and head_dim_v up to 2^30 - 1";
  return nullptr;
}

constexpr int64_t kMostHeadDim = 256;

inline const char* not_in_buckets(const AttentionProblem& p) {
  return maximum(p.head_dim, p.head_dim_v) > kMostHeadDim ? "serves head_dim and head_dim_v up to 256" : nullptr;
}

inline const char* not_float32(const AttentionProblem& p) {
  return p.dtype != DType::kFloat32 ? "serves float32 only" : not_in_buckets(p);
}

inline const char* not_tf32(const AttentionProblem& p) {
  if (const char* reason = not_float32(p)) return reason;
  return p.allow_tf32 ? nullptr : "torch.backends.cuda.matmul.allow_tf32 is off";
}

constexpr int64_t kMostDecoding = 16;  // queries of a sequence: a tile of the kernel

// Of the lengths of packed sequences a GPU's host knows only the total.
inline const char* not_decoding(const AttentionProblem& p) {
  const bool many = !p.cu_seqlens_q || p.seqlen_q > kMostDecoding * p.batch;
  if (p.max_seqlen_q > kMostDecoding && many) return "serves at most 16 queries a sequence, on average where packed";
  return not_in_buckets(p);
}

// The second derivatives hold more of each row at a time.
inline const char* not_in_moving_buckets(const AttentionProblem& p) {
  if (p.dtype == DType::kFloat64 && maximum(p.head_dim, p.head_dim_v) > kMostHeadDim / 2) {
    return "serves head_dim and head_dim_v up to 128 in float64";
  }
  return not_in_buckets(p);
}

}  // namespace attention_ext
