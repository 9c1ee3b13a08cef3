// Every change of a score and every rule that hides a key, written once for all kernels and devices.
//
// A mod has some of these one-line members, over a named position where the position matters:
//   modify          the changed score            slope, curve   its first and second derivative, 1 and 0 if absent
//   keep            whether the key is visible   cover          what a block of positions holds
//   by_slope        the score's derivative by the mod's own parameter
// ScoreMods applies them in the documented order: scale, softcap, bias and ALiBi, then what hides keys; and says which
// kinds of mods are there, by which kernels choose what they compile.
//
// Ops gives the arithmetic: Ops::V is a number, or a vector of numbers whose lanes are queries.
#pragma once

#include "core/varlen.h"

namespace attention_ext {

enum class Cover : uint8_t { kSkip, kPartial, kFull };

template <class Ops>
struct Position {
  typename Ops::V distance;  // k - diagonal(q)
  typename Ops::V bias;      // attn_mask at (b, h, q, k): 0 or -inf for a bool mask, 0 without a mask
};

// c * tanh(score / c), Gemma 2 (arXiv 2408.00118)
struct Softcap {
  double cap = 0.0;
  ATTENTION_INLINE explicit operator bool() const { return cap > 0.0; }

  template <class Ops>
  ATTENTION_INLINE typename Ops::V modify(typename Ops::V score) const {
    return Ops::splat(cap) * Ops::tanh(score * Ops::splat(1.0 / cap));
  }
  template <class Ops>
  ATTENTION_INLINE typename Ops::V slope(typename Ops::V capped) const {
    const auto t = capped * Ops::splat(1.0 / cap);
    return Ops::splat(1.0) - t * t;
  }
  template <class Ops>
  ATTENTION_INLINE typename Ops::V curve(typename Ops::V capped) const {
    const auto inverse = Ops::splat(1.0 / cap);  // its square may overflow
    return capped * inverse * (inverse * Ops::splat(-2.0)) * slope<Ops>(capped);
  }
};

struct Bias {
  bool present = false;
  ATTENTION_INLINE explicit operator bool() const { return present; }

  template <class Ops>
  ATTENTION_INLINE typename Ops::V modify(typename Ops::V score, const Position<Ops>& at) const {
    return score + at.bias;
  }
  template <class Ops>
  ATTENTION_INLINE typename Ops::Mask keep(const Position<Ops>& at) const {
    return at.bias != Ops::splat(-__builtin_inf());
  }
};

// -slope * |diagonal - k|, ALiBi (arXiv 2108.12409)
struct Alibi {
  double slope = 0.0;
  bool present = false;
  ATTENTION_INLINE explicit operator bool() const { return present; }

  template <class Ops>
  ATTENTION_INLINE typename Ops::V modify(typename Ops::V score, const Position<Ops>& at) const {
    return score - Ops::splat(slope) * Ops::abs(at.distance);
  }
  // d score / d slope
  template <class Ops>
  ATTENTION_INLINE typename Ops::V by_slope(const Position<Ops>& at) const {
    return -Ops::abs(at.distance);
  }
};

// Causal and sliding window: diagonal - left <= k <= diagonal + right.
struct Band {
  int64_t left = kUnlimited, right = kUnlimited;
  ATTENTION_INLINE explicit operator bool() const { return left < kUnlimited || right < kUnlimited; }

  template <class Ops>
  ATTENTION_INLINE typename Ops::Mask keep(const Position<Ops>& at) const {
    return (at.distance >= Ops::splat(-static_cast<double>(left))) &
           (at.distance <= Ops::splat(static_cast<double>(right)));
  }
  // q and k count within the sequence.
  ATTENTION_INLINE Cover cover(Range q, Range k, int64_t diagonal) const {
    const int64_t nearest = k.begin - (q.end - 1 + diagonal), farthest = k.end - 1 - (q.begin + diagonal);
    if (nearest > right || farthest < -left) return Cover::kSkip;
    return farthest <= right && nearest >= -left ? Cover::kFull : Cover::kPartial;
  }
};

template <class Ops>
struct Modified {
  typename Ops::V score;
  typename Ops::V slope, curve;  // first and second derivative of score by scale * dot
};

// A smaller scale is 0 in float32, if not by itself then times log2(e), and 0 times the -inf of a hidden key is NaN.
constexpr double kLeastLateScale = 1e-30;

// All mods of one head of one sequence.
struct ScoreMods {
  double scale = 1.0;
  Softcap softcap;
  Bias bias;
  Alibi alibi;
  Band band;

  ATTENTION_INLINE bool bends() const { return static_cast<bool>(softcap); }
  ATTENTION_INLINE bool adds() const { return bias || alibi; }
  // Whether scores are dot products times a scale that can wait for the exponential.
  ATTENTION_INLINE bool is_linear() const { return !bends() && !adds() && scale >= kLeastLateScale; }
  ATTENTION_INLINE ScoreMods only_bending() const {
    return {.scale = scale, .softcap = softcap, .bias = {}, .alibi = {}, .band = {}};
  }

  // dot: query . key, not scaled. Hidden keys come out as -inf.
  template <class Ops>
  ATTENTION_INLINE Modified<Ops> operator()(typename Ops::V dot, const Position<Ops>& at) const {
    Modified<Ops> out{dot * Ops::splat(scale), Ops::splat(1.0), Ops::splat(0.0)};
    if (softcap) {
      out.score = softcap.modify<Ops>(out.score);
      out.slope = softcap.slope<Ops>(out.score);
      out.curve = softcap.curve<Ops>(out.score);
    }
    if (bias) out.score = bias.modify<Ops>(out.score, at);
    if (alibi) out.score = alibi.modify<Ops>(out.score, at);
    return out;
  }
  template <class Ops>
  ATTENTION_INLINE typename Ops::V hide(typename Ops::V score, const Position<Ops>& at) const {
    const auto hidden = Ops::splat(-__builtin_inf());
    if (band) score = Ops::select(band.keep<Ops>(at), score, hidden);
    if (bias) score = Ops::select(bias.keep<Ops>(at), score, hidden);
    return score;
  }
};

// Of any head: all but what differs between heads, which a GPU's host cannot read.
ATTENTION_INLINE ScoreMods score_mods_of(const AttentionProblem& p) {
  ScoreMods mods;
  mods.scale = p.scale;
  mods.softcap.cap = p.softcap;
  mods.bias.present = static_cast<bool>(p.attn_mask);
  mods.alibi.present = p.alibi_slopes != nullptr;
  mods.band = {p.window_left, p.window_right};
  return mods;
}

ATTENTION_INLINE ScoreMods score_mods_of(const AttentionProblem& p, const Sequence& s, int64_t h) {
  ScoreMods mods = score_mods_of(p);
  if (p.alibi_slopes) mods.alibi.slope = p.alibi_slopes[s.batch * p.alibi_stride_b + h];
  return mods;
}

}  // namespace attention_ext
