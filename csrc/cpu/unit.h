// One instruction set's kernels: csrc/cpu/isa has a file for each, all from the same sources in csrc/cpu/kernels.
#pragma once

#include "core/plan.h"

namespace attention_ext {

using Planner = Plan (*)(const AttentionProblem&);

struct CpuUnit {
  Planner forward, decode, backward, weights, jvp, double_backward;
};

extern const CpuUnit kBaselineUnit, kAvx2Unit, kAvx512Unit, kAvx512Bf16Unit, kNeonUnit;

}  // namespace attention_ext
