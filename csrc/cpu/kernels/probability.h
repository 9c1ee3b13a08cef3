// Weights once the normaliser is known: prob = exp(score - logsumexp), block by block, as every pass after the forward
// needs.
#pragma once

#include "cpu/kernels/softmax.h"

namespace attention_ext {
namespace {

// Of a tile's queries: logsumexp, and its low-order part.
template <class T>
constexpr int64_t kLogsumexpNumbers = 2 * kQueries<T>;

// Spare lanes, and rows without a visible key, get +inf, which makes every weight 0.
template <class T, class Problem>
void load_logsumexp(const Problem& p, const Tile& tile, T* to) {
  const T infinity = static_cast<T>(__builtin_inf());
  const int64_t row = row_of(p, tile.sequence, tile.head) + tile.q.begin;
  const T *logsumexp = static_cast<const T*>(p.logsumexp) + row, *low = static_cast<const T*>(p.logsumexp_low);
  for (int64_t lane = 0; lane < tile.vectors * kLanes<T>; ++lane) {
    const bool spare = lane >= tile.q.size();
    const T value = spare ? -infinity : logsumexp[lane];
    to[lane] = value == -infinity ? infinity : value;
    to[kQueries<T> + lane] = spare || !low ? T(0) : low[row + lane];
  }
}

// The share of a head's sink in query q.
template <class T, class Problem>
ATTENTION_INLINE double sink_prob(const Problem& p, const Sequence& s, int64_t head, int64_t q) {
  const int64_t row = row_of(p, s, head) + q;
  const T logsumexp = static_cast<const T*>(p.logsumexp)[row];
  if (logsumexp == static_cast<T>(-__builtin_inf())) return 0.0;
  const T low = p.logsumexp_low ? static_cast<const T*>(p.logsumexp_low)[row] : T(0);
  const double sink = p.sinks[s.batch * p.sinks_stride_b + head];
  return __builtin_exp(sink - static_cast<double>(logsumexp) - static_cast<double>(low));
}

// A vector of weights, and the first and second derivative of their scores by scale * dot.
template <class T>
struct Weights {
  Vec<T> weight, softcap_grad, softcap_grad2;
};

// Dot products of a block become weights, a vector of queries at a time.
template <class C, int kVectors, ScoreMode kMode>
class Probability {
  using T = typename C::Scalar;

 public:
  ATTENTION_INLINE Probability(const Block<T>& block, const T* logsumexp)
      : block_(block),
        mods_(block.mods.template compiled_for<kMode>()),
        unit_(splat<T>(static_cast<T>(kHasScoreMod<kMode> ? 1.0 : block.mods.scale))) {
    unroll<kVectors>(UNROLLED(n) {
      base_[n] = load(logsumexp + n * kLanes<T>);
      low_[n] = load(logsumexp + kQueries<T> + n * kLanes<T>) * splat<T>(static_cast<T>(kLog2E));
    });
  }

  // Of key r and the queries of vector n. A score is rounded, as in the forward pass far from 0: otherwise the
  // largest weight of a row would be off by its rounding error. The difference comes before the factor: log2(e) *
  // logsumexp would be rounded first, and far from 0 that is a whole exponent.
  template <class N>
  ATTENTION_INLINE Weights<T> operator()(int64_t r, N n, Vec<T> dot) const {
    const Vec<T> log2e = splat<T>(static_cast<T>(kLog2E));
    Vec<T> score = dot, grad = splat<T>(1), grad2{};
    if constexpr (kHasScoreMod<kMode>) {
      const auto at = block_.at(r, n);
      const auto modified = mods_.template score_mod<VectorOps<T>>(dot, at);
      score = mods_.template masked<VectorOps<T>>(modified.score, at);
      grad = modified.softcap_grad;
      grad2 = modified.softcap_grad2;
    }
    Vec<T> weight = C::exponential(fma(score * unit_ - base_[n], log2e, -low_[n]));
    if constexpr (kMode == ScoreMode::kMask) {
      weight = block_.mods.masks.template masked<VectorOps<T>>(weight, block_.at(r, n), Vec<T>{});
    }
    return {weight, grad, grad2};
  }

 private:
  const Block<T>& block_;
  const ScoreMods mods_;
  const Vec<T> unit_;
  Vec<T> base_[kVectors], low_[kVectors];
};

// The same for a whole block, in place. `softcap_grad`, if it has room, receives that of each score.
template <class C, int kVectors, ScoreMode kMode>
void probability_block(const Block<typename C::Scalar>& block, Matrix<typename C::Scalar> score,
                       const typename C::Scalar* logsumexp, Matrix<typename C::Scalar> softcap_grad) {
  using T = typename C::Scalar;
  const Probability<C, kVectors, kMode> probability(block, logsumexp);
  for (int64_t r = 0; r < block.k.size(); ++r) {
    unroll<kVectors>(UNROLLED(n) {
      T* lanes = score.row(r) + n * kLanes<T>;
      const Weights<T> made = probability(r, n, load(lanes));
      store(lanes, made.weight);
      if (softcap_grad.data) store(softcap_grad.row(r) + n * kLanes<T>, made.softcap_grad);
    });
  }
}

}  // namespace
}  // namespace attention_ext
