// The options that are numbers or words: their ranges, and how a problem holds them.
#pragma once

#include "core/problem.h"
#include "torch/ops.h"

namespace attention_ext {

void check_numbers(const char* op, const AttentionOptions& options, c10::Device device);

// problem.head_dim is set: the default of scale follows from it.
void fill_numbers(AttentionProblem& problem, const AttentionOptions& options);

inline bool is_bottom_right(const AttentionOptions& options) { return options.causal_alignment == "bottom_right"; }

}  // namespace attention_ext
