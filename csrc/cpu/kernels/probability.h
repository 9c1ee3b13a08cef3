// Weights once the normaliser is known: prob = exp(score - logsumexp), block by block, as every pass after the forward
// needs.
#pragma once

#include "cpu/kernels/softmax.h"

namespace attention_ext {
namespace {

// Of a tile's queries: logsumexp, and what rounding took from it.
template <class T>
constexpr int64_t kLogsumexpNumbers = 2 * kQueries<T>;

// Spare lanes, and rows without a visible key, get +inf, which makes every weight 0.
template <class T, class Problem>
void load_logsumexp(const Problem& p, const Tile& tile, T* to) {
  const T infinity = static_cast<T>(__builtin_inf());
  const int64_t row = row_of(p, tile.sequence, tile.head) + tile.q.begin;
  const T *logsumexp = static_cast<const T*>(p.logsumexp) + row, *rest = static_cast<const T*>(p.logsumexp_rest);
  for (int64_t lane = 0; lane < tile.vectors * kLanes<T>; ++lane) {
    const bool spare = lane >= tile.q.size();
    const T value = spare ? -infinity : logsumexp[lane];
    to[lane] = value == -infinity ? infinity : value;
    to[kQueries<T> + lane] = spare || !rest ? T(0) : rest[row + lane];
  }
}

// The share of a head's sink in query q.
template <class T, class Problem>
ATTENTION_INLINE double sink_prob(const Problem& p, const Sequence& s, int64_t head, int64_t q) {
  const int64_t row = row_of(p, s, head) + q;
  const T logsumexp = static_cast<const T*>(p.logsumexp)[row];
  if (logsumexp == static_cast<T>(-__builtin_inf())) return 0.0;
  const T rest = p.logsumexp_rest ? static_cast<const T*>(p.logsumexp_rest)[row] : T(0);
  const double sink = p.sinks[s.batch * p.sinks_stride_b + head];
  return __builtin_exp(sink - static_cast<double>(logsumexp) - static_cast<double>(rest));
}

// A vector of weights, and the first and second derivative of their scores by scale * dot.
template <class T>
struct Weights {
  Vec<T> weight, slope, curve;
};

// Dot products of a block become weights, a vector of queries at a time.
template <class C, int kVectors, Rules kRules>
class Probability {
  using T = typename C::Scalar;

 public:
  ATTENTION_INLINE Probability(const Block<T>& block, const T* logsumexp)
      : block_(block),
        mods_(mods_of<kRules>(block.mods)),
        unit_(splat<T>(static_cast<T>(kModifies<kRules> ? 1.0 : block.mods.scale))) {
    unroll<kVectors>(UNROLLED(n) {
      base_[n] = load(logsumexp + n * kLanes<T>);
      rest_[n] = load(logsumexp + kQueries<T> + n * kLanes<T>) * splat<T>(static_cast<T>(kLog2E));
    });
  }

  // Of key r and the queries of vector n. A score is rounded, as the forward pass does far from 0: else the largest
  // weight of a row would be off by what its rounding took. The difference comes before the factor: log2(e) * logsumexp
  // would be rounded first, and far from 0 that is a whole exponent.
  template <class N>
  ATTENTION_INLINE Weights<T> operator()(int64_t r, N n, Vec<T> dot) const {
    const Vec<T> log2e = splat<T>(static_cast<T>(kLog2E));
    Vec<T> score = dot, slope = splat<T>(1), curve{};
    if constexpr (kModifies<kRules>) {
      const auto at = block_.at(r, n);
      const auto modified = mods_.template operator()<VectorOps<T>>(dot, at);
      score = mods_.template hide<VectorOps<T>>(modified.score, at);
      slope = modified.slope;
      curve = modified.curve;
    }
    Vec<T> weight = C::exponential(fma(score * unit_ - base_[n], log2e, -rest_[n]));
    if constexpr (kRules == Rules::kBand) {
      weight = block_.mods.band.template keep<VectorOps<T>>(block_.at(r, n)) ? weight : Vec<T>{};
    }
    return {weight, slope, curve};
  }

 private:
  const Block<T>& block_;
  const ScoreMods mods_;
  const Vec<T> unit_;
  Vec<T> base_[kVectors], rest_[kVectors];
};

// The same for a whole block, in place. `slope`, if it has room, receives the slope of each score.
template <class C, int kVectors, Rules kRules>
void probability_block(const Block<typename C::Scalar>& block, Matrix<typename C::Scalar> score,
                       const typename C::Scalar* logsumexp, Matrix<typename C::Scalar> slope) {
  using T = typename C::Scalar;
  const Probability<C, kVectors, kRules> probability(block, logsumexp);
  for (int64_t r = 0; r < block.k.size(); ++r) {
    unroll<kVectors>(UNROLLED(n) {
      T* lanes = score.row(r) + n * kLanes<T>;
      const Weights<T> made = probability(r, n, load(lanes));
      store(lanes, made.weight);
      if (slope.data) store(slope.row(r) + n * kLanes<T>, made.slope);
    });
  }
}

}  // namespace
}  // namespace attention_ext
