// Numbers as they lie in memory.
#pragma once

#include "core/numeric.h"

namespace attention_ext {

constexpr int kWarpSize = 32;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Tf32 {};  // float in memory, rounded to 11 bits where it is multiplied

namespace {

ATTENTION_INLINE float widen(float x) { return x; }
ATTENTION_INLINE double widen(double x) { return x; }

}  // namespace

}  // namespace attention_ext
