// The rest of logsumexp, a number that is rounded once and lost what a row of weights adds up to.
#pragma once

#include "torch/problem.h"

namespace attention_ext {

// What rounding took from logsumexp, (b, h, q): null where that is nothing to speak of, and on a GPU, where looking at
// values would wait for them. The weights of a row, made of logsumexp alone, add up to 1 within eps * |logsumexp|.
void* logsumexp_low(const AttentionProblem& call, const at::Tensor& logsumexp, Converted& converted);

}  // namespace attention_ext
