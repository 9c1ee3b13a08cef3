// The CUDA rows of the kernel table, best first.
#include <cstring>

#include "gpu/plan.h"
#include "gpu/reasons.h"
#include "gpu/unit.h"

namespace attention_ext {
namespace {

template <const char* (*why_not)(const AttentionProblem&)>
const char* on_sm80(const AttentionProblem& problem, int compute_capability) {
  return compute_capability < 80 ? "needs a GPU of compute capability 8.0 or later" : why_not(problem);
}

const GpuKernel kKernels[] = {
    {"sm80/forward", Pass::kForward, on_sm80<not_in_buckets>, plan_forward<GpuPlan>},
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
