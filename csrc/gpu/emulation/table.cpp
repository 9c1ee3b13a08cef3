// GPU kernels as rows of the CPU's table, to be asked for by name: each runs on the emulated warp layer.
#include "core/kernel_table.h"
#include "gpu/reasons.h"
#include "gpu/unit.h"

namespace attention_ext {
namespace {

const CpuKernel kKernels[] = {
    {"emulated_sm80/decode", Pass::kForward, not_decoding, plan_decode<Plan>, true},
    {"emulated_sm80/forward", Pass::kForward, not_in_buckets, plan_forward<Plan>, true},
    {"emulated_sm80/backward", Pass::kBackward, not_in_buckets, plan_backward<Plan>, true},
    {"emulated_sm80/weights", Pass::kWeights, not_in_buckets, plan_weights<Plan>, true},
    {"emulated_sm80/jvp", Pass::kJvp, not_in_moving_buckets, plan_jvp<Plan>, true},
    {"emulated_sm80/double_backward", Pass::kDoubleBackward, not_in_moving_buckets, plan_double_backward<Plan>, true},
    {"emulated_sm80_tf32/forward", Pass::kForward, not_float32, plan_forward<Plan, Tf32>, true},
    {"emulated_sm80_tf32/backward", Pass::kBackward, not_float32, plan_backward<Plan, Tf32>, true},
    {"emulated_simt/forward", Pass::kForward, serves_every_problem, plan_simt_forward<Plan>, true},
    {"emulated_simt/backward", Pass::kBackward, serves_every_problem, plan_simt_backward<Plan>, true},
    {"emulated_simt/weights", Pass::kWeights, serves_every_problem, plan_simt_weights<Plan>, true},
    {"emulated_simt/jvp", Pass::kJvp, serves_every_problem, plan_simt_jvp<Plan>, true},
    {"emulated_simt/double_backward", Pass::kDoubleBackward, serves_every_problem, plan_simt_double_backward<Plan>,
     true},
};

const bool kAdded = (add_cpu_kernels(kKernels), true);

}  // namespace

}  // namespace attention_ext
