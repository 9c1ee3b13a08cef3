// When delta = rowsum(grad_out * out) - grad_logsumexp must not be made of the out that forward returned.
//
// A 16-bit out is off by up to half a bit in its last place, and rows that repeat are all off by the same. For
// grad_query, grad_key and grad_value that is the rounding any 16-bit gradient has. But what gathers score gradients
// over many rows, the gradients of slopes, sinks and masks broadcast over queries or keys, would gather the error with
// them: there delta is computed from weights once more, in float, and nothing on the way is rounded.
#pragma once

#include "core/problem.h"

namespace attention_ext {

ATTENTION_INLINE bool needs_exact_delta(const BackwardProblem& p) {
  const bool coarse = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  const View& mask = p.grad_attn_mask;
  const bool gathers = mask && (mask.stride_row == 0 || mask.stride_col == 0);
  return coarse && p.head_dim_v > 0 && (p.grad_alibi_slopes || p.grad_sinks || gathers);
}

}  // namespace attention_ext
