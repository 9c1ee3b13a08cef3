// The kernels for AVX-512 F, BW, DQ, VL.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "cpu/vec/avx512.h"

#include "cpu/kernels/unit.h"

namespace attention_ext {

const CpuUnit kAvx512Unit = kUnit;

}  // namespace attention_ext

#if defined(__clang__)
#pragma clang attribute pop
#endif
