// x * 2^n without an instruction for it: n is added to the exponent.
#pragma once

#include "cpu/vec/simd.h"

namespace attention_ext {
namespace {

// x in [1/2, 2], n whole; underflows to 0, overflows to inf, NaN stays
ATTENTION_INLINE F32 scale_by_power(F32 x, F32 n) {
  const F32 magic = splat<float>(0x1.8p23f);
  const I32 exponent = bit_cast<I32>(n + magic) << 23;
  F32 scaled = bit_cast<F32>(bit_cast<I32>(x) + exponent);
  scaled = n < -125.0f ? F32{} : scaled;
  scaled = n > 126.0f ? splat<float>(__builtin_inff()) : scaled;
  return x == x ? scaled : x;
}

ATTENTION_INLINE F64 scale_by_power(F64 x, F64 n) {
  const F64 magic = splat<double>(0x1.8p52);
  const I64 exponent = bit_cast<I64>(n + magic) << 52;
  F64 scaled = bit_cast<F64>(bit_cast<I64>(x) + exponent);
  scaled = n < -1021.0 ? F64{} : scaled;
  scaled = n > 1022.0 ? splat<double>(__builtin_inf()) : scaled;
  return x == x ? scaled : x;
}

}  // namespace
}  // namespace attention_ext
