// 16-bit numbers to and from float, without the instructions that not every CPU has.
#pragma once

#include "gpu/warp/numbers.h"

namespace attention_ext {

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

inline float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t magnitude = (x.bits & 0x7FFFu) << 13, sign = (x.bits & 0x8000u) << 16;
  const bool finite = (x.bits & 0x7C00u) != 0x7C00u;
  return float_of(sign | (finite ? bits_of(float_of(magnitude) * 0x1p112f) : magnitude | 0x7F800000u));
}

// To nearest even; a NaN stays one.
inline Half narrow(Half, float x) { return {__builtin_bit_cast(uint16_t, static_cast<_Float16>(x))}; }
inline BFloat16 narrow(BFloat16, float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

}  // namespace attention_ext
