// In which order blocks of threads take the tiles of all heads: blocks that run at the same time should read the same
// keys and values, or queries, from the L2 cache.
#pragma once

#include "gpu/kernels/sequence_tiles.h"

namespace attention_ext {
namespace {

// The bytes of a row of everything that a pass streams: keys and values, or queries and gradients of out; of second
// order also tangents.
ATTENTION_INLINE int64_t streamed_bytes(const AttentionProblem& p) {
  return (p.head_dim + p.head_dim_v) * size_of(p.dtype);
}
ATTENTION_INLINE int64_t streamed_bytes(const JvpProblem& p) {
  return 2 * streamed_bytes(static_cast<const AttentionProblem&>(p));
}

// How many of a sequence's rows tiles of the same height see at most.
ATTENTION_INLINE int64_t seen_rows(const AttentionProblem& p, int64_t rows, int64_t length) {
  return minimum(length, rows + p.window_left + p.window_right);
}

// Of the L2, the share that is left to what is streamed; FlashAttention-3 takes as much of an H100's. Emulated blocks
// have so little that short sequences fill it.
ATTENTION_INLINE int64_t streaming_cache(const AttentionProblem& p) {
  constexpr int kEmulated = 16 << 10;
  return (p.l2_bytes > 0 ? p.l2_bytes : kEmulated) / 8 * 5;
}

// Lanes are heads, times what shares the rows that one key head streams. Sections of lanes are walked one after
// another: as many as have room in the cache, and as even as can be, so that the tiles that are walked last are short
// ones. In a section lanes are innermost, so that its first places, which should be the longest ones, come first.
class TileOrder {
 public:
  struct Step {
    uint32_t lane, place;
  };

  // bytes: that the lanes of one key head stream.
  ATTENTION_INLINE TileOrder(int64_t kv_heads, int64_t lanes_of_kv_head, int64_t places, int64_t bytes, int64_t cache)
      : lanes_(number(kv_heads * lanes_of_kv_head)), places_(number(places)) {
    const uint32_t heads = number(kv_heads);
    const uint32_t most = bytes < cache ? number(cache) / number(maximum<int64_t>(bytes, 1)) : 1;
    const uint32_t sections = most < heads ? (heads + most - 1) / most : 1;
    section_ = (heads + sections - 1) / sections * number(lanes_of_kv_head);
  }

  ATTENTION_INLINE Step at(int64_t index) const {
    const uint32_t first = number(index) / (section_ * places_) * section_;
    const uint32_t width = minimum(section_, lanes_ - first), rest = number(index) - first * places_;
    return {first + rest % width, rest / width};
  }

 private:
  // A launch has fewer than 2^31 blocks, and so fewer lanes and places: 32 bits hold them, which GPUs divide fast.
  ATTENTION_INLINE static uint32_t number(int64_t x) { return static_cast<uint32_t>(x); }

  uint32_t lanes_, places_, section_;
};

}  // namespace
}  // namespace attention_ext
