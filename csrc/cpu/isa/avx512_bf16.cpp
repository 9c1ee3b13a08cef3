// The kernels for bfloat16 on CPUs with AVX-512 BF16.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16")
#endif

#include "cpu/vec/avx512.h"

#include "cpu/kernels/backward.h"
#include "cpu/kernels/bfloat16.h"
#include "cpu/kernels/double_backward.h"
#include "cpu/kernels/forward.h"
#include "cpu/kernels/weights.h"
#include "cpu/unit.h"

namespace attention_ext {

const CpuUnit kAvx512Bf16Unit = {
    .forward = plan_forward<BFloat16Compute>,
    .decode = nullptr,  // reading the keys bounds it, not the products
    .backward = plan_backward<BFloat16Compute>,
    .weights = plan_weights<BFloat16Compute>,
    .jvp = plan_jvp<BFloat16Compute>,
    .double_backward = plan_double_backward<BFloat16Compute>,
};

}  // namespace attention_ext

#if defined(__clang__)
#pragma clang attribute pop
#endif
