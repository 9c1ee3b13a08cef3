// A mask by blocks of queries and keys, FlexAttention's BlockMask: a block is empty, full, or has a bit per position.
#pragma once

#include "core/numeric.h"

namespace attention_ext {

enum class BlockMask : uint8_t { kEmpty, kPartial, kFull };

// The entries of `blocks` for blocks that need no bits.
constexpr int32_t kEmptyBlock = -1, kFullBlock = -2;
constexpr int64_t kKeysPerByte = 8;

// Positions and sizes of blocks. GPUs divide 64 bits slowly and have sequences of fewer than 2^30 rows (gpu/reasons.h).
#if defined(__CUDA_ARCH__)
using BlockIndex = uint32_t;
#else
using BlockIndex = int64_t;
#endif

// q and k count within a sequence, as those of attn_mask.
struct SparseMask {
  const int32_t* blocks = nullptr;  // (b, h, query block, key block): kEmptyBlock, kFullBlock, or which of the bits
  int64_t stride_b = 0, stride_h = 0, stride_row = 0;  // 0 where broadcast
  const uint8_t* bits = nullptr;                       // (partial block, block_q, block_k / 8), the lowest bit first
  int64_t block_q = 1, block_k = kKeysPerByte;         // block_k is a multiple of 8
  int64_t partial = 0;                                 // blocks with bits

  ATTENTION_INLINE explicit operator bool() const { return blocks != nullptr; }

  // The blocks of a row of blocks.
  ATTENTION_INLINE const int32_t* row(int64_t b, int64_t h, int64_t query_block) const {
    return blocks + b * stride_b + h * stride_h + query_block * stride_row;
  }
  // The bits of a row of a partial block, from a byte on.
  ATTENTION_INLINE const uint8_t* bits_of(int32_t block, int64_t row, int64_t byte) const {
    return bits + (block * block_q + row) * (block_k / kKeysPerByte) + byte;
  }
  // The eight keys from `key` on, a multiple of 8, as query q sees them: a bit for each. Numbers of blocks that do not
  // exist, which a GPU's are not checked for, hide them.
  ATTENTION_INLINE uint8_t octet(int64_t b, int64_t h, BlockIndex q, BlockIndex key) const {
    const auto rows = static_cast<BlockIndex>(block_q), columns = static_cast<BlockIndex>(block_k);
    const int32_t block = row(b, h, q / rows)[key / columns];
    if (block < 0 || block >= partial) return block == kFullBlock ? 0xFF : 0;
    return *bits_of(block, q % rows, key % columns / kKeysPerByte);
  }
  // Bit i: whether query q sees key k.begin + i, for up to 56 keys.
  ATTENTION_INLINE uint64_t visible_bits(int64_t b, int64_t h, int64_t q, Range k) const {
    const int64_t first = k.begin / kKeysPerByte;
    uint64_t found = 0;
    for (int64_t byte = first; byte * kKeysPerByte < k.end; ++byte) {
      found |= static_cast<uint64_t>(octet(b, h, q, byte * kKeysPerByte)) << (kKeysPerByte * (byte - first));
    }
    return found >> (k.begin - first * kKeysPerByte);
  }
  // Whether any of the queries sees any of the eight keys from `key` on, a multiple of 8.
  ATTENTION_INLINE bool shows_octet(int64_t b, int64_t h, Range q, int64_t key) const {
    const int64_t bytes = block_k / kKeysPerByte;
    for (int64_t i = q.begin / block_q; i * block_q < q.end; ++i) {
      const int32_t block = row(b, h, i)[key / block_k];
      if (block == kFullBlock) return true;
      if (block == kEmptyBlock) continue;
      const Range rows{maximum(q.begin - i * block_q, int64_t{0}), minimum(q.end - i * block_q, block_q)};
      const uint8_t* from = bits_of(block, rows.begin, key % block_k / kKeysPerByte);
      for (int64_t r = 0; r < rows.size(); ++r) {
        if (from[r * bytes] != 0) return true;
      }
    }
    return false;
  }
  // Of k, what lies between the first and the last key that any of the queries sees, in whole octets.
  ATTENTION_INLINE Range seen_keys(int64_t b, int64_t h, Range q, Range k) const {
    int64_t begin = k.begin / kKeysPerByte * kKeysPerByte;
    while (begin < k.end && !shows_octet(b, h, q, begin)) begin += kKeysPerByte;
    if (begin >= k.end) return {};
    int64_t end = (k.end - 1) / kKeysPerByte * kKeysPerByte;
    while (!shows_octet(b, h, q, end)) end -= kKeysPerByte;
    return {maximum(k.begin, begin), minimum(k.end, end + kKeysPerByte)};
  }

  // Whether the queries see all, some or none of the keys; a block with bits counts as partial.
  ATTENTION_INLINE BlockMask block_mask(int64_t b, int64_t h, Range q, Range k) const {
    const auto rows = static_cast<BlockIndex>(block_q), columns = static_cast<BlockIndex>(block_k);
    const auto end_q = static_cast<BlockIndex>(q.end), end_k = static_cast<BlockIndex>(k.end);
    bool shows = false, hides = false;
    for (BlockIndex i = static_cast<BlockIndex>(q.begin) / rows; i * rows < end_q; ++i) {
      const int32_t* blocks_of_row = row(b, h, i);
      for (BlockIndex j = static_cast<BlockIndex>(k.begin) / columns; j * columns < end_k; ++j) {
        shows |= blocks_of_row[j] != kEmptyBlock;
        hides |= blocks_of_row[j] != kFullBlock;
      }
      if (shows && hides) return BlockMask::kPartial;
    }
    return shows ? BlockMask::kFull : BlockMask::kEmpty;
  }
  // Whether any of the queries of any of the heads sees some of the block of keys.
  ATTENTION_INLINE bool shows(int64_t b, Range heads, Range q, int64_t key_block) const {
    for (int64_t h = heads.begin; h < (stride_h == 0 ? heads.begin + 1 : heads.end); ++h) {
      const auto rows = static_cast<BlockIndex>(block_q), end = static_cast<BlockIndex>(q.end);
      for (BlockIndex i = static_cast<BlockIndex>(q.begin) / rows; i * rows < end; ++i) {
        if (row(b, h, i)[key_block] != kEmptyBlock) return true;
      }
    }
    return false;
  }
  // Whether all of the queries of all of the heads see all of the keys, by full blocks alone.
  ATTENTION_INLINE bool is_full(int64_t b, Range heads, Range q, Range k) const {
    for (int64_t h = heads.begin; h < (stride_h == 0 ? heads.begin + 1 : heads.end); ++h) {
      if (block_mask(b, h, q, k) != BlockMask::kFull) return false;
    }
    return true;
  }
  // Of k, the first run of neighbouring blocks that the queries see.
  ATTENTION_INLINE Range first_run(int64_t b, Range heads, Range q, Range k) const {
    int64_t block = k.begin / block_k;
    while (block * block_k < k.end && !shows(b, heads, q, block)) ++block;
    const int64_t begin = maximum(k.begin, block * block_k);
    while (block * block_k < k.end && shows(b, heads, q, block)) ++block;
    return {begin, minimum(k.end, block * block_k)};
  }
  // Of k, what lies between the first and the last block that the queries see.
  ATTENTION_INLINE Range hull(int64_t b, Range heads, Range q, Range k) const {
    Range seen = first_run(b, heads, q, k);
    if (seen.empty()) return {};
    for (int64_t block = (k.end - 1) / block_k; block * block_k >= seen.end; --block) {
      if (shows(b, heads, q, block)) return {seen.begin, minimum(k.end, (block + 1) * block_k)};
    }
    return seen;
  }
};

}  // namespace attention_ext
