// The kernels for AVX2 with FMA and F16C.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/vec/avx2.h"

#include "cpu/kernels/unit.h"

namespace attention_ext {

const CpuUnit kAvx2Unit = kUnit;

}  // namespace attention_ext

#if defined(__clang__)
#pragma clang attribute pop
#endif
