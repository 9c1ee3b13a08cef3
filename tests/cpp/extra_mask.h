// One more mask, which only `tests/cpp/run --extra-mask` lists in core/score_mods.h: kernels must apply it unedited.
#pragma once

namespace attention_ext {

// Hides keys from 8 to 30 positions before the diagonal, and those 20 or more after it.
struct Hole {
  bool present = false;
  ATTENTION_INLINE static Hole of(const AttentionProblem&) { return {true}; }
  ATTENTION_INLINE explicit operator bool() const { return present; }

  template <class Ops>
  ATTENTION_INLINE typename Ops::Mask mask_mod(const Position<Ops>& at) const {
    const auto before = (at.distance < Ops::splat(-30.0)) | (at.distance > Ops::splat(-8.0));
    return before & (at.distance < Ops::splat(20.0));
  }
  ATTENTION_INLINE BlockMask block_mask(Range q, Range k, int64_t diagonal) const {
    const int64_t nearest = k.begin - (q.end - 1 + diagonal), farthest = k.end - 1 - (q.begin + diagonal);
    if (!present || farthest < -30 || (nearest > -8 && farthest < 20)) return BlockMask::kFull;
    return nearest >= 20 || (nearest >= -30 && farthest <= -8) ? BlockMask::kEmpty : BlockMask::kPartial;
  }
};

}  // namespace attention_ext
