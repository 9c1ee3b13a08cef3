// The 16-bit numbers as they lie in memory.
#pragma once

#include <cstdint>

namespace attention_ext {

constexpr int kWarpSize = 32;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace attention_ext
