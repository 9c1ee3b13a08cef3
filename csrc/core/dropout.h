// The dropout of a call, for every kernel.
#pragma once

#include "core/philox.h"
#include "core/problem.h"

namespace attention_ext {

struct Dropout {
  bool present = false;
  PhiloxKey key{};
  uint32_t offset = 0, threshold = 0;
  double kept_scale = 1.0;
};

ATTENTION_INLINE Dropout dropout_of(const AttentionProblem& p) {
  if (p.dropout_p <= 0.0) return {};
  const auto seed = static_cast<uint64_t>(p.rng_state[0]);
  const uint32_t threshold = dropout_threshold(p.dropout_p);
  return {true,
          {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
          static_cast<uint32_t>(p.rng_state[1]),
          threshold,
          dropout_scale(threshold)};
}

}  // namespace attention_ext
