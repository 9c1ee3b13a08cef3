// Which weights of a block are kept, by core's Philox bits.
#pragma once

#include "core/dropout.h"
#include "gpu/kernels/positions.h"

namespace attention_ext {
namespace {

// The arithmetic of core/philox.h.
struct WordOps {
  ATTENTION_DEVICE static uint32_t splat(uint32_t x) { return x; }
  ATTENTION_DEVICE static void multiply_wide(uint32_t a, uint32_t m, uint32_t& high, uint32_t& low) {
    high = multiply_high(a, m);
    low = a * m;
  }
};

// As philox_bits, where k differs by lane: an array with a variable index would leave the registers.
ATTENTION_DEVICE uint32_t bits_of_key(const PhiloxWords<uint32_t>& words, int k) {
  const uint32_t early = k & 2 ? words.word[1] : words.word[0], late = k & 2 ? words.word[3] : words.word[2];
  return ((k & 4 ? late : early) >> (16 * (k & 1))) & 0xFFFFu;
}

// Calls f(m, n, i, kept) for every number of a block of scores. Shards begin at whole octets of keys.
template <int kRowTiles, int kTiles, class Block, class F>
ATTENTION_DEVICE void for_each_kept(const Block& block, const Dropout& dropout, F&& f) {
  if (!dropout.present) {
    ATTENTION_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      for_each_number<kTiles>([&](int n, int i) { f(m, n, i, true); });
    }
    return;
  }
  const uint32_t batch_head = dropout.batch_head(block.head.sequence.batch, block.head.head);
  ATTENTION_UNROLL
  for (int m = 0; m < kRowTiles; ++m) {
    for_each_number<kTiles>([&](int n, int i) {
      const auto q = static_cast<uint32_t>(block.query(m, n, i));
      const uint32_t octet = dropout.first_key / kKeysPerPhilox + static_cast<uint32_t>(block.octet(m, n, i));
      const auto words = dropout.words<WordOps>(q, octet, batch_head);
      f(m, n, i, bits_of_key(words, block.key(m, n, i)) >= dropout.threshold);
    });
  }
}

}  // namespace
}  // namespace attention_ext
