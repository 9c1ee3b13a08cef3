// Dropout bits from (seed, offset, batch, head, q, k) alone: the same in every pass, tiling, thread count and device.
//
// Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with 7 rounds, the least that passes
// BigCrush. One call serves eight consecutive keys of one query with 16 bits each.
#pragma once

#include "core/numeric.h"

namespace attention_ext {

constexpr int kPhiloxRounds = 7;
constexpr int kKeysPerPhilox = 8;

// U: uint32_t or a vector of it. Ops::multiply_wide(a, m, high, low) is the 64-bit product of each lane.
template <class U>
struct PhiloxWords {
  U word[4];
};

struct PhiloxKey {
  uint32_t low, high;  // the seed
};

// counter = (q, k / 8, batch * heads + head, offset); only q varies across lanes.
template <class Ops, class U>
ATTENTION_INLINE PhiloxWords<U> philox(PhiloxKey key, U q, uint32_t k_octet, uint32_t batch_head, uint32_t offset) {
  U c0 = q, c1 = Ops::splat(k_octet), c2 = Ops::splat(batch_head), c3 = Ops::splat(offset);
  uint32_t key0 = key.low, key1 = key.high;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    U high0, low0, high1, low1;
    Ops::multiply_wide(c0, 0xD2511F53u, high0, low0);
    Ops::multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ Ops::splat(key0);
    c1 = low1;
    c2 = high0 ^ c3 ^ Ops::splat(key1);
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The 16 bits of key k out of its octet's words.
template <class U>
ATTENTION_INLINE U philox_bits(const PhiloxWords<U>& words, int64_t k) {
  const int j = static_cast<int>(k % kKeysPerPhilox);
  return (words.word[j / 2] >> (16 * (j % 2))) & 0xFFFFu;
}

constexpr uint32_t kAllDropped = 1u << 16;

// A weight is dropped when its 16 bits lie below this: p rounded to a multiple of 2^-16, and to 1 for p = 1 alone.
ATTENTION_INLINE uint32_t dropout_threshold(double p) {
  const auto rounded = static_cast<uint32_t>(p * kAllDropped + 0.5);
  return p < 1.0 && rounded == kAllDropped ? kAllDropped - 1 : rounded;
}

// Of the weights that are kept: one over the probability with which that happens, 0 when nothing is kept.
ATTENTION_INLINE double dropout_scale(uint32_t threshold) {
  return threshold == kAllDropped ? 0.0 : static_cast<double>(kAllDropped) / (kAllDropped - threshold);
}

}  // namespace attention_ext
