// The kernels for any x86-64 CPU (SSE2).
#include "cpu/vec/portable.h"

#include "cpu/kernels/unit.h"

namespace attention_ext {

const CpuUnit kBaselineUnit = kUnit;

}  // namespace attention_ext
