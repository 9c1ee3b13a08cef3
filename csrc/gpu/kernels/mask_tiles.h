// How the mask's gradient is cut into tiles: each block of threads owns one, and along broadcast dimensions the only
// one owns everything.
#pragma once

#include "core/problem.h"

namespace attention_ext {
namespace {

struct MaskPart {
  Range batches, heads, query_tiles, key_tiles;
};

class MaskTiles {
 public:
  // queries, keys: of a tile
  ATTENTION_INLINE MaskTiles(const BackwardProblem& p, int queries, int keys)
      : batches_{p.batch, p.grad_attn_mask.stride_b == 0},
        heads_{p.heads, p.grad_attn_mask.stride_h == 0},
        query_tiles_{ceil_div(p.max_seqlen_q, queries), p.grad_attn_mask.stride_row == 0},
        key_tiles_{ceil_div(p.max_seqlen_k, keys), p.grad_attn_mask.stride_col == 0} {}

  ATTENTION_INLINE int64_t blocks() const {
    return batches_.blocks() * heads_.blocks() * query_tiles_.blocks() * key_tiles_.blocks();
  }

  // The part that a block of threads owns; neighbours own neighbouring keys.
  ATTENTION_INLINE MaskPart part(int64_t block) const {
    MaskPart part;
    part.key_tiles = key_tiles_.take(block);
    part.query_tiles = query_tiles_.take(block);
    part.heads = heads_.take(block);
    part.batches = batches_.take(block);
    return part;
  }

 private:
  struct Axis {
    int64_t count;
    bool broadcast;

    ATTENTION_INLINE int64_t blocks() const { return broadcast ? 1 : count; }
    // Of an index with this axis innermost, which is left with the others.
    ATTENTION_INLINE Range take(int64_t& index) const {
      const int64_t own = index % blocks();
      index /= blocks();
      return broadcast ? Range{0, count} : Range{own, own + 1};
    }
  };

  Axis batches_, heads_, query_tiles_, key_tiles_;
};

}  // namespace
}  // namespace attention_ext
