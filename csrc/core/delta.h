// When delta = rowsum(grad_out * out) - grad_logsumexp must not be computed from the out that forward returned.
//
// A 16-bit out has an error of up to half a unit in the last place, the same for rows that repeat. In grad_query,
// grad_key and grad_value it is as small as their own rounding. Gradients of slopes, sinks and masks broadcast over
// queries or keys sum score gradients over many rows and would sum the error too: for them delta is computed from
// weights once more, in float, without rounding in between.
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
