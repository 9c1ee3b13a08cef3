// Every change of a score and every mask, written once for all kernels and devices, in FlexAttention's words.
//
// A mod has some of these members, over a named position where the position matters:
//   score_mod      the changed score               softcap_grad, softcap_grad2   its first and second derivative
//   mask_mod       whether the key is visible      block_mask    whether it hides all, some or none of a block
//   slope_grad     derivative of the score by the mod's own parameter
// ScoreMods applies them in the documented order: scale, softcap, bias and ALiBi, then masks. It alone decides whether
// a block of positions is empty, partial or full, and which instance of a kernel serves it; kernels name no single mod.
//
// Ops gives the arithmetic: Ops::V is a number, or a vector of numbers whose lanes are queries.
#pragma once

#include "core/varlen.h"

namespace attention_ext {

// The mods that a kernel is compiled for: none but the scale, masks by position, a nonlinear score_mod, or all.
enum class ScoreMode : uint8_t { kNone, kMask, kSoftcap, kAll };

// Whether scores are changed before the exponential; otherwise they stay dot products and the scale is folded into it.
template <ScoreMode kMode>
constexpr bool kHasScoreMod = kMode == ScoreMode::kSoftcap || kMode == ScoreMode::kAll;

template <class Ops>
struct Position {
  typename Ops::V distance;  // k - diagonal(q)
  typename Ops::V bias;      // attn_mask at (b, h, q, k): 0 or -inf for a bool mask, 0 without a mask
};

// c * tanh(score / c), Gemma 2 (arXiv 2408.00118)
struct Softcap {
  double cap = 0.0, inverse = 0.0;
  bool present = false;
  ATTENTION_INLINE static Softcap of(const AttentionProblem& p) {
    return is_positive(p.softcap) ? Softcap{p.softcap, 1.0 / p.softcap, true} : Softcap{};
  }
  ATTENTION_INLINE explicit operator bool() const { return present; }

  template <class Ops>
  ATTENTION_INLINE typename Ops::V score_mod(typename Ops::V score) const {
    return Ops::splat(cap) * Ops::tanh(score * Ops::splat(inverse));
  }
  template <class Ops>
  ATTENTION_INLINE typename Ops::V softcap_grad(typename Ops::V capped) const {
    const auto t = capped * Ops::splat(inverse);
    return Ops::splat(1.0) - t * t;
  }
  template <class Ops>
  ATTENTION_INLINE typename Ops::V softcap_grad2(typename Ops::V capped) const {
    const auto factor = Ops::splat(inverse);  // its square may overflow
    return capped * factor * (factor * Ops::splat(-2.0)) * softcap_grad<Ops>(capped);
  }
};

// attn_mask, added or bool
struct Bias {
  bool present = false;
  ATTENTION_INLINE explicit operator bool() const { return present; }

  template <class Ops>
  ATTENTION_INLINE typename Ops::V score_mod(typename Ops::V score, const Position<Ops>& at) const {
    return score + at.bias;
  }
  template <class Ops>
  ATTENTION_INLINE typename Ops::Mask mask_mod(const Position<Ops>& at) const {
    return at.bias != Ops::splat(-__builtin_inf());
  }
};

// -slope * |diagonal - k|, ALiBi (arXiv 2108.12409)
struct Alibi {
  double slope = 0.0;
  bool present = false;
  ATTENTION_INLINE explicit operator bool() const { return present; }

  template <class Ops>
  ATTENTION_INLINE typename Ops::V score_mod(typename Ops::V score, const Position<Ops>& at) const {
    return score - Ops::splat(slope) * Ops::abs(at.distance);
  }
  template <class Ops>
  ATTENTION_INLINE typename Ops::V slope_grad(const Position<Ops>& at) const {
    return -Ops::abs(at.distance);
  }
};

// Causal and sliding window: diagonal - left <= k <= diagonal + right.
struct Band {
  int64_t left = kUnlimited, right = kUnlimited;
  ATTENTION_INLINE static Band of(const AttentionProblem& p) { return {p.window_left, p.window_right}; }
  ATTENTION_INLINE explicit operator bool() const { return left < kUnlimited || right < kUnlimited; }

  template <class Ops>
  ATTENTION_INLINE typename Ops::Mask mask_mod(const Position<Ops>& at) const {
    return (at.distance >= Ops::splat(-static_cast<double>(left))) &
           (at.distance <= Ops::splat(static_cast<double>(right)));
  }
  // q and k count within the sequence.
  ATTENTION_INLINE BlockMask block_mask(Range q, Range k, int64_t diagonal) const {
    const int64_t nearest = k.begin - (q.end - 1 + diagonal), farthest = k.end - 1 - (q.begin + diagonal);
    if (nearest > right || farthest < -left) return BlockMask::kEmpty;
    return farthest <= right && nearest >= -left ? BlockMask::kFull : BlockMask::kPartial;
  }
};

// Mods that hide keys by position alone. Each is a struct with `of`, an inactive default, operator bool, mask_mod and
// block_mask, as Band.
template <class... Mod>
struct MaskMods : Mod... {
  ATTENTION_INLINE static MaskMods of(const AttentionProblem& p) { return {Mod::of(p)...}; }
  ATTENTION_INLINE explicit operator bool() const { return (static_cast<bool>(get<Mod>()) || ...); }

  // The score, -inf where one of the mods hides the key. At least one of them is active.
  template <class Ops>
  ATTENTION_INLINE typename Ops::V masked(typename Ops::V score, const Position<Ops>& at,
                                          typename Ops::V hidden = Ops::splat(-__builtin_inf())) const {
    ((score = sizeof...(Mod) == 1 || get<Mod>() ? Ops::select(get<Mod>().template mask_mod<Ops>(at), score, hidden)
                                                : score),
     ...);
    return score;
  }
  ATTENTION_INLINE BlockMask block_mask(Range q, Range k, int64_t diagonal) const {
    return MaskMods(*this).restrict_to(q, k, diagonal);
  }
  // The same; also switches off the mods that hide nothing of the block.
  ATTENTION_INLINE BlockMask restrict_to(Range q, Range k, int64_t diagonal) {
    BlockMask least = BlockMask::kFull;
    const auto add = [&](auto& mod) {
      const BlockMask block = mod.block_mask(q, k, diagonal);
      if (block < least) least = block;
      if (block == BlockMask::kFull) mod = {};
    };
    (add(static_cast<Mod&>(*this)), ...);
    return least;
  }

 private:
  template <class M>
  ATTENTION_INLINE const M& get() const {
    return *this;
  }
};

using PositionMasks = MaskMods<Band>;

template <class Ops>
struct ModifiedScore {
  typename Ops::V score;
  typename Ops::V softcap_grad, softcap_grad2;  // first and second derivative of score by scale * dot
};

// A smaller scale is 0 in float32, if not by itself then times log2(e), and 0 times the -inf of a hidden key is NaN.
constexpr double kLeastFoldedScale = 1e-30;

// All mods of one head of one sequence.
struct ScoreMods {
  double scale = 1.0;
  Softcap softcap;
  Bias bias;
  Alibi alibi;
  PositionMasks masks;

  // Whether the derivative of a score by its dot product is not just the scale.
  ATTENTION_INLINE bool is_nonlinear() const { return static_cast<bool>(softcap); }
  ATTENTION_INLINE bool reads_bias() const { return static_cast<bool>(bias); }
  ATTENTION_INLINE bool has_slope() const { return static_cast<bool>(alibi); }

  // The instance of a kernel that serves these mods.
  ATTENTION_INLINE ScoreMode mode() const {
    if (folds_scale_into_exp()) return masks ? ScoreMode::kMask : ScoreMode::kNone;
    return masks || bias || alibi ? ScoreMode::kAll : ScoreMode::kSoftcap;
  }
  // Whether scores are dot products times a scale that the exponential can apply.
  ATTENTION_INLINE bool folds_scale_into_exp() const {
    return !softcap && !bias && !alibi && at_least(scale, kLeastFoldedScale);
  }
  // Switches off the mods that change nothing in a block; bias_block is the block of attn_mask, full where it is 0.
  ATTENTION_INLINE BlockMask restrict_to(Range q, Range k, int64_t diagonal, BlockMask bias_block) {
    if (bias_block == BlockMask::kEmpty) return BlockMask::kEmpty;
    if (bias_block == BlockMask::kFull) bias = {};
    return masks.restrict_to(q, k, diagonal);
  }
  // The mods that an instance has to look at; the others are known to be absent.
  template <ScoreMode kMode>
  ATTENTION_INLINE ScoreMods compiled_for() const {
    ScoreMods some = *this;
    if constexpr (kMode != ScoreMode::kAll) {
      some.bias = {};
      some.alibi = {};
      some.masks = {};
    }
    return some;
  }

  // dot: query . key, not scaled.
  template <class Ops>
  ATTENTION_INLINE ModifiedScore<Ops> score_mod(typename Ops::V dot, const Position<Ops>& at) const {
    ModifiedScore<Ops> out{dot * Ops::splat(scale), Ops::splat(1.0), Ops::splat(0.0)};
    if (softcap) {
      out.score = softcap.score_mod<Ops>(out.score);
      out.softcap_grad = softcap.softcap_grad<Ops>(out.score);
      out.softcap_grad2 = softcap.softcap_grad2<Ops>(out.score);
    }
    if (bias) out.score = bias.score_mod<Ops>(out.score, at);
    if (alibi) out.score = alibi.score_mod<Ops>(out.score, at);
    return out;
  }
  // The score, -inf where the key is hidden. partial: whether masks by position hide any.
  template <class Ops>
  ATTENTION_INLINE typename Ops::V masked(typename Ops::V score, const Position<Ops>& at, bool partial = true) const {
    if (partial && masks) score = masks.masked<Ops>(score, at);
    if (bias) score = Ops::select(bias.mask_mod<Ops>(at), score, Ops::splat(-__builtin_inf()));
    return score;
  }
};

// Of any head: all but the slope, which differs between heads and which a GPU's host cannot read.
ATTENTION_INLINE ScoreMods score_mods_of(const AttentionProblem& p) {
  ScoreMods mods;
  mods.scale = p.score_mod ? 1.0 : p.scale;  // a compiled score_mod has applied it
  mods.softcap = Softcap::of(p);
  mods.bias.present = static_cast<bool>(p.attn_mask);
  mods.alibi.present = p.alibi_slopes != nullptr;
  mods.masks = PositionMasks::of(p);
  return mods;
}

ATTENTION_INLINE ScoreMods score_mods_of(const AttentionProblem& p, const Sequence& s, int64_t h) {
  ScoreMods mods = score_mods_of(p);
  if (p.alibi_slopes) mods.alibi.slope = p.alibi_slopes[s.batch * p.alibi_stride_b + h];
  return mods;
}

}  // namespace attention_ext
