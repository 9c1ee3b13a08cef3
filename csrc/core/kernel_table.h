// Kernels as data: ordered rows, best first, a table for each device. Selection, error texts, explain() and the tests
// that force a kernel by name all read them.
#pragma once

#include <cstdint>
#include <span>

#include "core/plan.h"

namespace attention_ext {

enum class Pass : uint8_t { kForward, kBackward, kWeights, kJvp, kDoubleBackward };

// Calls f with a blank problem of the pass.
template <class F>
auto with_problem(Pass pass, F&& f) {
  switch (pass) {
    case Pass::kBackward:
      return f(BackwardProblem{});
    case Pass::kWeights:
      return f(WeightsProblem{});
    case Pass::kJvp:
      return f(JvpProblem{});
    case Pass::kDoubleBackward:
      return f(DoubleBackwardProblem{});
    case Pass::kForward:
      break;
  }
  return f(ForwardProblem{});
}

struct CpuKernel {
  const char* name;  // instruction set and algorithm, e.g. "avx512/forward"
  Pass pass;
  // Null when the kernel serves the problem, else the reason as a phrase: "needs AVX-512, which this CPU lacks".
  const char* (*why_not)(const AttentionProblem& problem);
  Plan (*plan)(const AttentionProblem& problem);
  bool on_request = false;  // never chosen but by name
};

constexpr const char* kOnRequest = "an emulation for tests: only when asked for by name";

std::span<const CpuKernel> cpu_kernels();

// Called while a library that brings kernels of its own is loaded: the emulated kernels of tests do.
void add_cpu_kernels(std::span<const CpuKernel> more);

// The first row of the pass that serves the problem (named `forced` if given), or null.
const CpuKernel* select_cpu_kernel(Pass pass, const AttentionProblem& problem, const char* forced = nullptr);

// The widest instruction set in use: the CPU's, or the one that ATTENTION_EXT_ISA limits it to; "none" if it names
// none.
const char* cpu_instruction_set();

}  // namespace attention_ext
