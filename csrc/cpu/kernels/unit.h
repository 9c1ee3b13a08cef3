// All kernels of one instruction set, for its row in the kernel table.
#pragma once

#include "cpu/kernels/backward.h"
#include "cpu/kernels/decode.h"
#include "cpu/kernels/double_backward.h"
#include "cpu/kernels/forward.h"
#include "cpu/kernels/weights.h"
#include "cpu/unit.h"

namespace attention_ext {
namespace {

template <Planner kSingle, Planner kDouble>
Plan by_dtype(const AttentionProblem& p) {
  return p.dtype == DType::kFloat64 ? kDouble(p) : kSingle(p);
}

// 16-bit numbers are widened to float.
constexpr CpuUnit kUnit = {
    .forward = by_dtype<plan_forward<FloatCompute>, plan_forward<DoubleCompute>>,
    .decode = by_dtype<plan_decode<FloatCompute>, plan_decode<DoubleCompute>>,
    .backward = by_dtype<plan_backward<FloatCompute>, plan_backward<DoubleCompute>>,
    .weights = by_dtype<plan_weights<FloatCompute>, plan_weights<DoubleCompute>>,
    .jvp = by_dtype<plan_jvp<FloatCompute>, plan_jvp<DoubleCompute>>,
    .double_backward = by_dtype<plan_double_backward<FloatCompute>, plan_double_backward<DoubleCompute>>,
};

}  // namespace
}  // namespace attention_ext
