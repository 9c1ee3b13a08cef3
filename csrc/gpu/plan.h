// How a GPU kernel asks to be run: the host owns memory and streams, the kernel says how much of each. The same plan
// is enqueued on a stream or run by the emulator (gpu/warp/emulated.h), block by block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/kernel_table.h"
#include "core/problem.h"

namespace attention_ext {

// Of a block, on every GPU from sm_80 on but the smallest (8.6, 8.9 and 12.x), and on those.
constexpr size_t kMostSharedBytes = 163 << 10, kFewSharedBytes = 99 << 10;

struct Launch;

// `workspace`: GpuPlan::workspace_bytes for the whole call, 256-byte aligned, not cleared. `stream`: a cudaStream_t;
// ignored by the emulator. Returns 0, or the cudaError_t of the launch.
using Enqueue = int (*)(const Launch& launch, const AttentionProblem& problem, void* workspace, void* stream);

struct Launch {
  int64_t blocks = 0;
  int threads = 0;
  size_t shared_bytes = 0;
  Enqueue enqueue = nullptr;
};

// Launches run one after another on one stream.
struct GpuPlan {
  Launch launches[8];
  int launch_count = 0;
  size_t workspace_bytes = 0;
};

struct GpuKernel {
  const char* name;  // architecture and algorithm, e.g. "sm80/forward"
  Pass pass;
  // Null when the kernel serves the problem on a GPU of this compute capability (80, 90; 0: there is none), else the
  // reason as a phrase.
  const char* (*why_not)(const AttentionProblem& problem, int compute_capability);
  GpuPlan (*plan)(const AttentionProblem& problem);
};

std::span<const GpuKernel> gpu_kernels();

const GpuKernel* select_gpu_kernel(Pass pass, const AttentionProblem& problem, int compute_capability,
                                   const char* forced = nullptr);

}  // namespace attention_ext
