// GPU kernels as rows of the CPU's table, to be asked for by name: each runs on the emulated warp layer.
#include "core/kernel_table.h"
#include "gpu/reasons.h"
#include "gpu/unit.h"

namespace attention_ext {
namespace {

template <Plan (*kPlan)(const AttentionProblem&), Pass kPass>
constexpr CpuKernel row(const char* name, const char* (*why_not)(const AttentionProblem&)) {
  return {name, kPass, why_not, plan_row<Plan, kPlan, kPass>, true};
}

const CpuKernel kKernels[] = {
    row<plan_decode<Plan>, Pass::kForward>("emulated_sm80/decode", not_decoding),
    row<plan_forward<Plan>, Pass::kForward>("emulated_sm80/forward", not_in_buckets),
    row<plan_backward<Plan>, Pass::kBackward>("emulated_sm80/backward", not_in_buckets),
    row<plan_weights<Plan>, Pass::kWeights>("emulated_sm80/weights", not_in_buckets),
    row<plan_jvp<Plan>, Pass::kJvp>("emulated_sm80/jvp", not_in_moving_buckets),
    row<plan_double_backward<Plan>, Pass::kDoubleBackward>("emulated_sm80/double_backward", not_in_moving_buckets),
    row<plan_forward<Plan, Tf32>, Pass::kForward>("emulated_sm80_tf32/forward", not_float32),
    row<plan_backward<Plan, Tf32>, Pass::kBackward>("emulated_sm80_tf32/backward", not_float32),
    row<plan_simt_forward<Plan>, Pass::kForward>("emulated_simt/forward", serves_every_problem),
    row<plan_simt_backward<Plan>, Pass::kBackward>("emulated_simt/backward", serves_every_problem),
    row<plan_simt_weights<Plan>, Pass::kWeights>("emulated_simt/weights", serves_every_problem),
    row<plan_simt_jvp<Plan>, Pass::kJvp>("emulated_simt/jvp", serves_every_problem),
    row<plan_simt_double_backward<Plan>, Pass::kDoubleBackward>("emulated_simt/double_backward", serves_every_problem),
};

const bool kAdded = (add_cpu_kernels(kKernels), true);

}  // namespace

}  // namespace attention_ext
