// The kernels for any AArch64 CPU (NEON).
#include "cpu/vec/portable.h"

#include "cpu/kernels/unit.h"

namespace attention_ext {

const CpuUnit kNeonUnit = kUnit;

}  // namespace attention_ext
