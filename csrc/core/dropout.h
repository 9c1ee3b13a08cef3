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
  uint32_t first_query = 0, first_key = 0, first_head = 0, heads = 0;  // positions of a shard in the whole call

  // The number of a head among those of all batch entries.
  ATTENTION_INLINE uint32_t batch_head(int64_t batch, int64_t head) const {
    return first_head + static_cast<uint32_t>(batch) * heads + static_cast<uint32_t>(head);
  }

  // The bits of an octet of keys, by number of the octet within the whole sequence; q counts within the call.
  template <class Ops, class U>
  ATTENTION_INLINE PhiloxWords<U> words(U q, uint32_t octet, uint32_t batch_head) const {
    return philox<Ops>(key, q + Ops::splat(first_query), octet, batch_head, offset);
  }
};

// The same dropout, with its offset and positions read again: kernels that do so hold them in no register.
ATTENTION_INLINE Dropout positions_of(const AttentionProblem& p, Dropout dropout) {
  dropout.offset = static_cast<uint32_t>(p.rng_state[1]);
  dropout.first_query = static_cast<uint32_t>(p.query_offset);
  dropout.first_key = static_cast<uint32_t>(p.key_offset);
  dropout.first_head = static_cast<uint32_t>(p.shards_heads ? p.rng_state[2] : 0);
  dropout.heads = static_cast<uint32_t>(p.shards_heads ? p.rng_state[3] : p.heads);
  return dropout;
}

ATTENTION_INLINE Dropout dropout_of(const AttentionProblem& p) {
  if (!is_positive(p.dropout_p)) return {};
  const auto seed = static_cast<uint64_t>(p.rng_state[0]);
  Dropout dropout;
  dropout.present = true;
  dropout.key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  dropout.threshold = dropout_threshold(p.dropout_p);
  dropout.kept_scale = dropout_scale(dropout.threshold);
  return positions_of(p, dropout);
}

}  // namespace attention_ext
