// The scalar instance of the arithmetic that core/philox.h is written in.
#pragma once

#include "core/philox.h"

namespace attention_ext::test {

struct ScalarWords {
  static uint32_t splat(uint32_t x) { return x; }
  static void multiply_wide(uint32_t a, uint32_t m, uint32_t& high, uint32_t& low) {
    const uint64_t product = static_cast<uint64_t>(a) * m;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

}  // namespace attention_ext::test
