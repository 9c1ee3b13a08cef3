// Choosing a CPU kernel for a problem and running it on torch's threads and torch's memory.
#pragma once

#include <iterator>
#include <string>

#include "core/kernel_table.h"

namespace attention_ext {

// By Pass.
constexpr const char* kPassNames[] = {"forward", "backward", "weights", "jvp", "double_backward"};
constexpr const char* kOperatorNames[] = {"attention", "attention_backward", "attention_weights", "attention_jvp",
                                          "attention_double_backward"};

Pass pass_of(std::string_view name);

// Throws with every row's reason where no kernel serves the problem.
void run_on_cpu(Pass pass, const AttentionProblem& problem);

// "avx512/forward: chosen", "neon/forward: needs ...", one line for each kernel of the pass.
std::string explain_cpu_kernels(Pass pass, const AttentionProblem& problem);

// From now on only this kernel is used for the pass; an empty name lifts it. For tests.
void force_cpu_kernel(Pass pass, const std::string& name);

// How often the operator of this pass has run in this process, on any device.
int64_t call_count(Pass pass);
void count_call(Pass pass);

}  // namespace attention_ext
