// The low-order part of logsumexp: without it recomputed weights need not sum to 1.
#pragma once

#include "torch/problem.h"

namespace attention_ext {

// The low-order part of logsumexp, (b, h, q): null where it is negligible, and on a GPU, where looking at
// values would wait for them. The weights of a row, made of logsumexp alone, add up to 1 within eps * |logsumexp|.
void* logsumexp_low(const AttentionProblem& call, const at::Tensor& logsumexp, Converted& converted);

}  // namespace attention_ext
