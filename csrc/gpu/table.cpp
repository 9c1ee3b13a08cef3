// The GPU rows of the kernel table, best first. A call takes the first row whose why_not is silent.
#include <cstring>

#include "gpu/reasons.h"
#include "gpu/unit.h"

namespace attention_ext {
namespace {

using Planner = GpuPlan (*)(const AttentionProblem&);
using Reason = const char* (*)(const AttentionProblem&);

// Of one block of threads.
size_t most_shared_bytes(int compute_capability) {
  switch (compute_capability) {
    case 80:
    case 87:
      return kMostSharedBytes;
    case 86:
    case 89:
    case 120:
    case 121:
      return kFewSharedBytes;
    default:
      return 227 << 10;
  }
}

template <Planner kPlan, Reason kReason>
const char* unavailable(const AttentionProblem& problem, int compute_capability) {
  if (compute_capability == 0) return "needs a GPU, and torch finds none (is there a driver? nvidia-smi shows it)";
  if (compute_capability < 80) return "needs a GPU of compute capability 8.0 or later";
  if (const char* reason = beyond_count(problem)) return reason;
  if (const char* reason = kReason(problem)) return reason;
  const GpuPlan plan = kPlan(problem);
  for (int i = 0; i < plan.launch_count; ++i) {
    if (plan.launches[i].shared_bytes > most_shared_bytes(compute_capability)) {
      return "needs more shared memory than this GPU has";
    }
    if (plan.launches[i].blocks > kMostBlocks) return "needs more blocks of threads than a launch has";
  }
  return nullptr;
}

template <Planner kPlan, Reason kReason, Pass kPass>
constexpr GpuKernel row(const char* name) {
  return {name, kPass, unavailable<kPlan, kReason>, plan_row<GpuPlan, kPlan, kPass>};
}

const GpuKernel kKernels[] = {
    row<plan_decode<GpuPlan>, not_decoding, Pass::kForward>("sm80/decode"),
    row<plan_forward<GpuPlan, Tf32>, not_tf32, Pass::kForward>("sm80_tf32/forward"),
    row<plan_forward<GpuPlan>, not_in_buckets, Pass::kForward>("sm80/forward"),
    row<plan_backward<GpuPlan, Tf32>, not_tf32, Pass::kBackward>("sm80_tf32/backward"),
    row<plan_backward<GpuPlan>, not_in_buckets, Pass::kBackward>("sm80/backward"),
    row<plan_weights<GpuPlan>, not_in_buckets, Pass::kWeights>("sm80/weights"),
    row<plan_jvp<GpuPlan>, not_in_moving_buckets, Pass::kJvp>("sm80/jvp"),
    row<plan_double_backward<GpuPlan>, not_in_moving_buckets, Pass::kDoubleBackward>("sm80/double_backward"),
    row<plan_simt_forward<GpuPlan>, serves_every_problem, Pass::kForward>("simt/forward"),
    row<plan_simt_backward<GpuPlan>, serves_every_problem, Pass::kBackward>("simt/backward"),
    row<plan_simt_weights<GpuPlan>, serves_every_problem, Pass::kWeights>("simt/weights"),
    row<plan_simt_jvp<GpuPlan>, serves_every_problem, Pass::kJvp>("simt/jvp"),
    row<plan_simt_double_backward<GpuPlan>, serves_every_problem, Pass::kDoubleBackward>("simt/double_backward"),
};

}  // namespace

std::span<const GpuKernel> gpu_kernels() { return kKernels; }

const GpuKernel* select_gpu_kernel(Pass pass, const AttentionProblem& problem, int compute_capability,
                                   const char* forced) {
  for (const GpuKernel& kernel : kKernels) {
    if (kernel.pass != pass || (forced != nullptr && std::strcmp(forced, kernel.name) != 0)) continue;
    if (kernel.why_not(problem, compute_capability) == nullptr) return &kernel;
  }
  return nullptr;
}

}  // namespace attention_ext
