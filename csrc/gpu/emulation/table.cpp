// GPU kernels as rows of the CPU's table, to be asked for by name: each runs on the emulated warp layer.
#include "core/kernel_table.h"
#include "gpu/reasons.h"
#include "gpu/unit.h"

namespace attention_ext {
namespace {

using Reason = const char* (*)(const AttentionProblem&);

template <Reason kReason>
const char* unavailable(const AttentionProblem& problem) {
  if (const char* reason = beyond_count(problem)) return reason;
  return kReason(problem);
}

template <Plan (*kPlan)(const AttentionProblem&), Reason kReason, Pass kPass>
constexpr CpuKernel row(const char* name) {
  return {name, kPass, unavailable<kReason>, plan_row<Plan, kPlan, kPass>, true};
}

const CpuKernel kKernels[] = {
    row<plan_decode<Plan>, not_decoding, Pass::kForward>("emulated_sm80/decode"),
    row<plan_forward<Plan>, not_in_buckets, Pass::kForward>("emulated_sm80/forward"),
    row<plan_backward<Plan>, not_in_buckets, Pass::kBackward>("emulated_sm80/backward"),
    row<plan_weights<Plan>, not_in_buckets, Pass::kWeights>("emulated_sm80/weights"),
    row<plan_jvp<Plan>, not_in_moving_buckets, Pass::kJvp>("emulated_sm80/jvp"),
    row<plan_double_backward<Plan>, not_in_moving_buckets, Pass::kDoubleBackward>("emulated_sm80/double_backward"),
    row<plan_forward<Plan, Tf32>, not_float32, Pass::kForward>("emulated_sm80_tf32/forward"),
    row<plan_backward<Plan, Tf32>, not_float32, Pass::kBackward>("emulated_sm80_tf32/backward"),
    row<plan_simt_forward<Plan>, serves_every_problem, Pass::kForward>("emulated_simt/forward"),
    row<plan_simt_backward<Plan>, serves_every_problem, Pass::kBackward>("emulated_simt/backward"),
    row<plan_simt_weights<Plan>, serves_every_problem, Pass::kWeights>("emulated_simt/weights"),
    row<plan_simt_jvp<Plan>, serves_every_problem, Pass::kJvp>("emulated_simt/jvp"),
    row<plan_simt_double_backward<Plan>, serves_every_problem, Pass::kDoubleBackward>("emulated_simt/double_backward"),
};

const bool kAdded = (add_cpu_kernels(kKernels), true);

}  // namespace

}  // namespace attention_ext
