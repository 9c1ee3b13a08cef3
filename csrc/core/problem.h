// An attention call with every default filled in and every argument checked.
// Plain pointers and numbers: no torch, no CUDA runtime. A kernel reads a Problem and nothing else.
#pragma once

#include <cstdint>

#include "core/sparse_mask.h"

namespace attention_ext {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kBool };

// Bytes of a number.
ATTENTION_INLINE int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBool:
      return 1;
    default:
      return 2;
  }
}

constexpr int64_t kUnlimited = INT64_MAX / 4;  // a window side without a limit; adding lengths to it cannot overflow

// Scores further from 0 are rounded so coarsely that differences of scores are taken before anything else.
constexpr double kFarFromZero = 1024;

// Up to this number of queries of a sequence are few: every pass on a CPU makes their scores one dot product at a time,
// as the kernel for decoding does, so that all passes round a score alike.
constexpr int64_t kFewQueries = 8;

// A non-owning 4-D array (batch, heads, row, column). Strides count elements; 0 where broadcast.
struct View {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride_b = 0, stride_h = 0, stride_row = 0, stride_col = 0;

  ATTENTION_INLINE explicit operator bool() const { return data != nullptr; }
};

struct ScoreModCall;  // attention_ext/score_block.h

// score = softcap(score_mod(scale * query . key)) + attn_mask - alibi_slope * |diagonal - k|, then masks.
struct AttentionProblem {
  int64_t batch = 0;  // sequences: with cu_seqlens their number, while the tensors have batch 1
  int64_t heads = 0, kv_heads = 0;
  int64_t seqlen_q = 0, seqlen_k = 0;  // with cu_seqlens the total lengths
  int64_t head_dim = 0, head_dim_v = 0;
  DType dtype = DType::kFloat32;  // of query, key, value, out and their gradients
  bool allow_tf32 = false;        // GPUs may round the operands of float32 products to 11 bits

  View query, key, value;  // (b, h, q, d), (b, kv_h, k, d), (b, kv_h, k, d_v)
  View attn_mask;          // (b, h, q, k), bool (true: attend) or added to the score; q and k count within a sequence
  SparseMask sparse_mask;

  const double* alibi_slopes = nullptr;        // (batch or 1, heads)
  int64_t alibi_stride_b = 0;                  // heads, or 0 where all sequences share their slopes
  const double* sinks = nullptr;               // (batch or 1, heads)
  int64_t sinks_stride_b = 0;                  // heads, or 0, likewise
  const int64_t* key_lengths = nullptr;        // (batch,)
  const int64_t* cu_seqlens_q = nullptr;       // (batch + 1,)
  const int64_t* cu_seqlens_k = nullptr;       // (batch + 1,)
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;  // of one sequence, or a bound of it

  double scale = 1.0;
  const ScoreModCall* score_mod = nullptr;                      // compiled from a function of the user, CPUs only
  double softcap = 0.0;                                         // 0: none
  int64_t window_left = kUnlimited, window_right = kUnlimited;  // causal is window_right = 0
  bool bottom_right = false;                 // the diagonal ends in the last corner, not starts in the first
  int64_t query_offset = 0, key_offset = 0;  // the first positions of a shard of longer sequences

  int multiprocessors = 0, l2_bytes = 0;  // of the GPU that the call runs on; 0 on a CPU
  int64_t key_parts = 0;  // that a forward pass on a GPU cuts the keys of a tile into; 0: as many as it needs

  // (b, h, q) or null: the low-order part of logsumexp, which rounding beside a maximum of -1e9 would lose; without it
  // recomputed weights need not sum to 1. The forward kernels of a CPU write it, its other passes read it.
  void* logsumexp_low = nullptr;

  double dropout_p = 0.0;
  const int64_t* rng_state = nullptr;  // (2,): seed, offset; or (4,) for a shard of the heads: also first head, heads
  bool shards_heads = false;           // rng_state has four elements

  ATTENTION_INLINE int64_t group_size() const { return heads / kv_heads; }
  ATTENTION_INLINE bool has_tensor_mask() const { return attn_mask || sparse_mask; }
};

// logsumexp, delta and everything else that has one number per query: (b, h, q), contiguous, in the accumulate type
// (double for float64, else float), natural logarithm, sink included, -inf for a row without a visible key.
struct ForwardProblem : AttentionProblem {
  View out;                    // (b, h, q, d_v)
  void* logsumexp = nullptr;   // (b, h, q)
  void* max_scores = nullptr;  // (b, h, q) or null, written by the kernels that have a score_mod

  // Packed sequences of fewer or more queries are left to another run, so that each has the kernel that it would have
  // alone. For CPUs: a GPU's lengths are not known before the launch.
  int64_t least_queries = 0, most_queries = kUnlimited;

  ATTENTION_INLINE bool serves(int64_t b) const {
    if (!cu_seqlens_q) return true;
    const int64_t queries = cu_seqlens_q[b + 1] - cu_seqlens_q[b];
    return least_queries <= queries && queries <= most_queries;
  }
};

// Gradients that are not required are null. With head_dim_v == 0 there is no value, no out and no grad_out.
struct BackwardProblem : AttentionProblem {
  View out, grad_out;                     // (b, h, q, d_v)
  const void* logsumexp = nullptr;        // (b, h, q)
  const void* grad_logsumexp = nullptr;   // (b, h, q) or null
  View grad_query, grad_key, grad_value;  // like query, key, value
  View grad_attn_mask;                  // accumulate type, mask's shape, zeroed by the caller; stride 0 where broadcast
  double* grad_alibi_slopes = nullptr;  // (batch, heads), summed over a broadcast batch by the caller
  double* grad_sinks = nullptr;         // (batch, heads), likewise

  ATTENTION_INLINE bool wants_gradients() const {
    return grad_query || grad_key || grad_value || grad_attn_mask || grad_alibi_slopes || grad_sinks;
  }
};

// Tangents of the six differentiable inputs; null means a zero tangent.
struct Tangents {
  View query, key, value;                // like the inputs
  View attn_mask;                        // like the mask, in a dtype the mask may have but bool
  const double* alibi_slopes = nullptr;  // (batch, heads)
  const double* sinks = nullptr;         // (batch, heads)
};

// Tangents of out and logsumexp. A jvp has no grad_out and wants no gradients.
struct JvpProblem : BackwardProblem {
  Tangents tangent;
  View out_tangent;                   // (b, h, q, d_v); double backward may not want it
  void* logsumexp_tangent = nullptr;  // (b, h, q)
};

// The gradients of attention_backward's results along the tangents: those with respect to grad_out and grad_logsumexp
// are the tangents of out and logsumexp, those with respect to the inputs the tangents of the first gradients (the
// Hessian is symmetric). The grad_* fields of BackwardProblem receive the latter.
struct DoubleBackwardProblem : JvpProblem {};

struct WeightsProblem : AttentionProblem {
  const void* logsumexp = nullptr;  // (b, h, q)
  View weights;                     // (b, h or 1, rows, k), in the dtype of query
  bool average_heads = false;
  int64_t row_begin = 0, row_end = 0;  // the queries asked for
};

}  // namespace attention_ext
