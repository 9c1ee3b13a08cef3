// Weights once the normaliser is known: prob = exp(score - logsumexp), block by block, as every pass after the forward
// needs.
#pragma once

#include "cpu/kernels/softmax.h"

namespace attention_ext {
namespace {

// logsumexp of a tile's queries; +inf, which makes every weight 0, for rows without a visible key and spare
// lanes.
template <class T>
void load_logsumexp(const T* logsumexp, const Tile& tile, T* to) {
  const T infinity = static_cast<T>(__builtin_inf());
  for (int64_t lane = 0; lane < tile.vectors * kLanes<T>; ++lane) {
    const T value = lane < tile.q.size() ? logsumexp[lane] : -infinity;
    to[lane] = value == -infinity ? infinity : value;
  }
}

// First and second derivative of score by scale * dot, kept where a mod bends scores.
template <class T>
struct Derivatives {
  Matrix<T> slope, curve;
};

// Dot products become weights in place. `bend`, as far as it has room, receives the derivatives of the scores.
template <class C, int kVectors, Rules kRules>
void probability_block(const Block<typename C::Scalar>& block, Matrix<typename C::Scalar> score,
                       const typename C::Scalar* logsumexp, const Derivatives<typename C::Scalar>& bend) {
  using T = typename C::Scalar;
  const T unit = static_cast<T>(kModifies<kRules> ? kLog2E : block.mods.scale * kLog2E);
  const Vec<T> log2e = splat<T>(static_cast<T>(kLog2E));
  const ScoreMods mods = mods_of<kRules>(block.mods);
  Vec<T> base[kVectors];
  unroll<kVectors>(UNROLLED(n) { base[n] = load(logsumexp + n * kLanes<T>); });
  const bool far = kModifies<kRules> && far_from_zero<T>(base);
  for (int64_t r = 0; r < block.k.size(); ++r) {
    unroll<kVectors>(UNROLLED(n) {
      T* lanes = score.row(r) + n * kLanes<T>;
      Vec<T> s = load(lanes);
      if constexpr (kModifies<kRules>) {
        const auto at = block.at(r, n);
        const auto modified = mods.template operator()<VectorOps<T>>(s, at);
        s = mods.template hide<VectorOps<T>>(modified.score, at);
        if (bend.slope.data) store(bend.slope.row(r) + n * kLanes<T>, modified.slope);
        if (bend.curve.data) store(bend.curve.row(r) + n * kLanes<T>, modified.curve);
      }
      Vec<T> weight = C::exponential(far ? (s - base[n]) * log2e : fma(s, splat<T>(unit), -base[n] * log2e));
      if constexpr (kRules == Rules::kBand) {
        weight = block.mods.band.template keep<VectorOps<T>>(block.at(r, n)) ? weight : Vec<T>{};
      }
      store(lanes, weight);
    });
  }
}

}  // namespace
}  // namespace attention_ext
