// How a kernel asks to be run on the CPU: the host owns threads and memory, the kernel says how much of each.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/problem.h"

namespace attention_ext {

// A kernel runs as a few phases, one after another. Jobs of a phase are independent: any thread may take any
// job.
struct Phase {
  int64_t jobs = 0;
  // shared: Plan::shared_bytes for the whole call; scratch: Plan::scratch_bytes for this thread alone. Both 64-byte
  // aligned.
  void (*run)(const AttentionProblem& problem, void* shared, void* scratch, int64_t job) = nullptr;
};

struct Plan {
  Phase phases[8];
  int phase_count = 0;
  size_t shared_bytes = 0, scratch_bytes = 0;
};

}  // namespace attention_ext
