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

// kept_scale is held as T.
template <ScoreMode kMode, class T>
ATTENTION_DEVICE Dropout dropout_by(const AttentionProblem& p) {
  Dropout dropout;
  if constexpr (kMode == ScoreMode::kAll) {
    dropout = dropout_of(p);
    dropout.kept_scale = held<T>(dropout.kept_scale);
  }
  return dropout;
}

// As philox_bits, where k differs by lane: an array with a variable index would leave the registers.
ATTENTION_DEVICE uint32_t bits_of_key(const PhiloxWords<uint32_t>& words, int k) {
  const uint32_t early = k & 2 ? words.word[1] : words.word[0], late = k & 2 ? words.word[3] : words.word[2];
  return ((k & 4 ? late : early) >> (16 * (k & 1))) & 0xFFFFu;
}

// The bits of a lane's numbers in fragments n to n + kFragments - 1 of 16 rows: i % 2 (of queries against keys) or i /
// 2 (of keys against queries) is the half of a word.
template <bool kTransposed, int kFragments>
struct KeptBits {
  uint32_t word[kFragments][2];

  ATTENTION_DEVICE bool has(int n, int i, uint32_t threshold) const {
    const uint32_t bits = word[n][kTransposed ? i % 2 : i / 2];
    return ((kTransposed ? i / 2 : i % 2) == 0 ? bits & 0xFFFFu : bits >> 16) >= threshold;
  }
};

// Rows are queries, and a fragment is an octet of keys: each lane of a group makes the words of one of four octets.
template <class Words>
ATTENTION_DEVICE void make_bits(KeptBits<false, 4>& bits, int query, uint32_t octet, Words&& words) {
  const int lane = reread_lane_index(), group = lane / 4, member = lane % 4;
  ATTENTION_UNROLL
  for (int r = 0; r < 2; ++r) {
    auto own = words(query + r * 8 + group, octet + static_cast<uint32_t>(member));
    transpose_in_group(own.word, lane);
    ATTENTION_UNROLL
    for (int n = 0; n < 4; ++n) bits.word[n][r] = own.word[n];
  }
}

// The same for fewer fragments: each lane makes the words that it needs.
template <class Words>
ATTENTION_DEVICE void make_bits(KeptBits<false, 2>& bits, int query, uint32_t octet, Words&& words) {
  const int lane = reread_lane_index(), group = lane / 4, member = lane % 4;
  ATTENTION_UNROLL
  for (int i = 0; i < 4; ++i) {
    const auto own = words(query + i % 2 * 8 + group, octet + static_cast<uint32_t>(i / 2));
    const uint32_t early = member % 2 ? own.word[1] : own.word[0], late = member % 2 ? own.word[3] : own.word[2];
    bits.word[i / 2][i % 2] = member < 2 ? early : late;
  }
}

// Rows are two octets of keys. Eight lanes have the same queries, two of each of two fragments: each lane makes the
// words of one query and octet, and they transpose the 8 x 8 halves of these.
template <class Words>
ATTENTION_DEVICE void make_bits(KeptBits<true, 2>& bits, int query, uint32_t octet, Words&& words) {
  const int lane = reread_lane_index(), group = lane / 4, member = lane % 4;
  const int column = group / 4 * kFragmentColumns + 2 * member + group / 2 % 2;
  auto own = words(query + column, octet + static_cast<uint32_t>(group % 2));
  exchange(own.word[0], own.word[2], 16, lane);
  exchange(own.word[1], own.word[3], 16, lane);
  exchange(own.word[0], own.word[1], 8, lane);
  exchange(own.word[2], own.word[3], 8, lane);
  ATTENTION_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = own.word[i], other = shuffle_xor(word, 4);
    bits.word[i / 2][i % 2] = group % 2 ? other >> 16 | (word & 0xFFFF0000u) : (word & 0xFFFFu) | other << 16;
  }
}

// Calls f(m, n, i, kept) for every number of a block of scores. Shards begin at whole octets of keys, as blocks do.
template <int kRowTiles, int kTiles, class Block, class F>
ATTENTION_DEVICE void for_each_kept(const Block& block, const Dropout& dropout, F&& f) {
  if (!dropout.present) {
    return for_each_number<kRowTiles, kTiles>([&](int m, int n, int i) { f(m, n, i, true); });
  }
  const Dropout here = positions_of(block.p, dropout);
  const uint32_t batch_head = here.batch_head(block.head.sequence.batch, block.head.head);
  const auto words = [&](int q, uint32_t octet) {
    return here.words<WordOps>(static_cast<uint32_t>(q), octet, batch_head);
  };
  constexpr bool kTransposed = Block::kIsTransposed;
  constexpr int kFragments = kTransposed || kTiles % 4 != 0 ? 2 : 4;
  const uint32_t first = (here.first_key + static_cast<uint32_t>(block.corner.k)) / kKeysPerPhilox;
  ATTENTION_UNROLL
  for (int m = 0; m < kRowTiles; ++m) {
    ATTENTION_UNROLL
    for (int n = 0; n < kTiles; n += kFragments) {
      KeptBits<kTransposed, kFragments> bits;
      const int row = m * kFragmentRows, column = n * kFragmentColumns;
      make_bits(bits, block.corner.q + (kTransposed ? column : row),
                first + static_cast<uint32_t>((kTransposed ? row : column) / kKeysPerPhilox), words);
      for_each_number<kFragments>([&](int j, int i) { f(m, n + j, i, bits.has(j, i, dropout.threshold)); });
    }
  }
}

}  // namespace
}  // namespace attention_ext
