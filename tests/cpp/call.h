// A call with all its memory, and its expected results, computed by plain loops in double.
#pragma once

#include <optional>
#include <string>

#include "numbers.h"

namespace attention_ext::test {

enum class Mask : uint8_t { kNone, kBool, kFloat, kFloatPerKey, kFloatPerQuery };

struct Case {
  std::string name;
  int64_t batch = 2, heads = 2, kv_heads = 1, seqlen_q = 5, seqlen_k = 7, head_dim = 8, head_dim_v = 8;
  Mask mask = Mask::kNone;
  int64_t window_left = kUnlimited, window_right = kUnlimited;
  bool bottom_right = false;
  int64_t query_offset = 0, key_offset = 0;
  double softcap = 0.0, scale = 0.3, dropout_p = 0.0, slope = 0.1;
  int64_t block_q = 0, block_k = 0;    // of a sparse mask, none where 0
  int64_t poisoned_from = kUnlimited;  // keys and values from here on are NaN; the extra mask hides them
  bool alibi = false, sinks = false, key_lengths = false, varlen = false, heads_last = false;
};

struct Call {
  Case spec;
  DType dtype;
  Array query, key, value, out, grad_out, grad_query, grad_key, grad_value;
  Array logsumexp, logsumexp_low, grad_logsumexp, weights, mean_weights;
  Array query_tangent, key_tangent, value_tangent, out_tangent, logsumexp_tangent;
  std::optional<Array> mask, grad_mask, mask_tangent;
  Guarded blocks, bits;  // of the sparse mask, whose heads differ
  Guarded slopes, sinks, lengths, cu_seqlens_q, cu_seqlens_k, rng_state, grad_slopes, grad_sinks, slopes_tangent,
      sinks_tangent;

  Call(const Case& spec, DType dtype);

  ForwardProblem forward() const;
  BackwardProblem backward();
  WeightsProblem weights_problem(bool average_heads) const;
  JvpProblem jvp() const;
  DoubleBackwardProblem double_backward(bool compute_out_tangent = true);

  // The call in double, each input plus `step` times its tangent.
  Call along_tangents(double step) const;

 private:
  int64_t sequences() const;
  int64_t query_blocks() const { return spec.block_q > 0 ? ceil_div(spec.seqlen_q, spec.block_q) : 0; }
  int64_t key_blocks() const { return spec.block_q > 0 ? ceil_div(spec.seqlen_k, spec.block_k) : 0; }
  void fill_blocks();
  void fill(AttentionProblem& problem) const;
  void fill(BackwardProblem& problem);
  Tangents tangents() const;
  void poison_keys();
};

struct Expected {
  Numbers out, logsumexp, weights, mean_weights, grad_query, grad_key, grad_value, grad_mask, grad_slopes, grad_sinks;
};

Expected expect(const Call& call);

// The tangents of the above by central differences; weights are not differentiated.
Expected expected_tangents(const Call& call);

}  // namespace attention_ext::test
