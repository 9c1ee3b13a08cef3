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
  if (compute_capability < 80) return "needs a GPU of compute capability 8.0 or later";
  if (const char* reason = kReason(problem)) return reason;
  const GpuPlan plan = kPlan(problem);
  for (int i = 0; i < plan.launch_count; ++i) {
    if (plan.launches[i].shared_bytes > most_shared_bytes(compute_capability)) {
      return "needs more shared memory than this GPU has";
    }
  }
  return nullptr;
}

template <Planner kPlan, Reason kReason>
constexpr GpuKernel row(const char* name, Pass pass) {
  return {name, pass, unavailable<kPlan, kReason>, kPlan};
}

const GpuKernel kKernels[] = {
    row<plan_decode<GpuPlan>, not_decoding>("sm80/decode", Pass::kForward),
    row<plan_forward<GpuPlan, Tf32>, not_tf32>("sm80_tf32/forward", Pass::kForward),
    row<plan_forward<GpuPlan>, not_in_buckets>("sm80/forward", Pass::kForward),
    row<plan_backward<GpuPlan, Tf32>, not_tf32>("sm80_tf32/backward", Pass::kBackward),
    row<plan_backward<GpuPlan>, not_in_buckets>("sm80/backward", Pass::kBackward),
    row<plan_weights<GpuPlan>, not_in_buckets>("sm80/weights", Pass::kWeights),
    row<plan_jvp<GpuPlan>, not_in_moving_buckets>("sm80/jvp", Pass::kJvp),
    row<plan_double_backward<GpuPlan>, not_in_moving_buckets>("sm80/double_backward", Pass::kDoubleBackward),
    row<plan_simt_forward<GpuPlan>, serves_every_problem>("simt/forward", Pass::kForward),
    row<plan_simt_backward<GpuPlan>, serves_every_problem>("simt/backward", Pass::kBackward),
    row<plan_simt_weights<GpuPlan>, serves_every_problem>("simt/weights", Pass::kWeights),
    row<plan_simt_jvp<GpuPlan>, serves_every_problem>("simt/jvp", Pass::kJvp),
    row<plan_simt_double_backward<GpuPlan>, serves_every_problem>("simt/double_backward", Pass::kDoubleBackward),
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
