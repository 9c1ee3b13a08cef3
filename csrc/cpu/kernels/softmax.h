// Online softmax over blocks of keys (Milakov & Gimelshein, arXiv 1805.02867), in base 2, one query per lane.
#pragma once

#include "cpu/kernels/block.h"

namespace attention_ext {
namespace {

template <class T>
struct RowState {
  T* maximum;  // of the scores so far, -inf before the first visible key
  T* sum;      // of exp(score - maximum)
};

template <class T>
ATTENTION_INLINE Vec<T> finite_or_zero(Vec<T> maximum) {
  return maximum == splat<T>(static_cast<T>(-__builtin_inf())) ? Vec<T>{} : maximum;
}

template <class T>
ATTENTION_INLINE Vec<T> logsumexp_of(Vec<T> maximum, Vec<T> sum) {
  return fma(log2<T>(sum), splat<T>(static_cast<T>(kLn2)), maximum);
}

// The low-order part of logsumexp, 0 where it is infinite.
template <class T>
ATTENTION_INLINE Vec<T> logsumexp_low_of(Vec<T> maximum, Vec<T> sum) {
  const Vec<T> logsumexp = logsumexp_of<T>(maximum, sum);
  const Vec<T> low = fma(log2<T>(sum), splat<T>(static_cast<T>(kLn2)), maximum - logsumexp);
  return abs<T>(logsumexp) < static_cast<T>(__builtin_inf()) ? low : Vec<T>{};
}

// 0 for a row without a visible key
template <class T>
ATTENTION_INLINE Vec<T> one_over(Vec<T> sum) {
  return sum == Vec<T>{} ? Vec<T>{} : splat<T>(1) / sum;
}

// A mask of -1e4 or -1e30 takes scores there. log2(e) * base, rounded, would be off by up to a whole exponent, or
// overflow: differences of scores must come first. Elsewhere one multiply-add makes an exponent.
template <class T, int kVectors>
ATTENTION_INLINE bool any_far_from_zero(const Vec<T> (&base)[kVectors]) {
  decltype(base[0] < base[0]) far{};
  unroll<kVectors>(UNROLLED(n) {
    const Vec<T> distance = abs<T>(base[n]);
    far |= (distance > static_cast<T>(kFarFromZero)) & (distance < static_cast<T>(__builtin_inf()));
  });
  return any_lane(far);
}

// Dot products become unnormalised weights: in place, or in `pairs` of keys where C pairs and there is room. `factor`
// receives the factor that rescales earlier sums of the row.
template <class C, int kVectors, ScoreMode kMode>
void softmax_block(const Block<typename C::Scalar>& block, Matrix<typename C::Scalar> score,
                   RowState<typename C::Scalar> state, typename C::Scalar* factor, Matrix<typename C::Element> pairs) {
  using T = typename C::Scalar;
  const int64_t rows = block.k.size();
  const ScoreMods mods = block.mods.template compiled_for<kMode>();
  T exp_scale = static_cast<T>(kHasScoreMod<kMode> ? 1.0 : block.mods.scale);
  Vec<T> block_max[kVectors];
  unroll<kVectors>(UNROLLED(n) { block_max[n] = splat<T>(static_cast<T>(-__builtin_inf())); });
  for (int64_t r = 0; r < rows; ++r) {
    unroll<kVectors>(UNROLLED(n) {
      T* lanes = score.row(r) + n * kLanes<T>;
      Vec<T> s = load(lanes);
      if constexpr (kHasScoreMod<kMode>) {
        const auto at = block.at(r, n);
        s = mods.template masked<VectorOps<T>>(mods.template score_mod<VectorOps<T>>(s, at).score, at);
        store(lanes, s);
      } else if constexpr (kMode == ScoreMode::kMask) {
        s = block.mods.masks.template masked<VectorOps<T>>(s, block.at(r, n));
        store(lanes, s);
      }
      block_max[n] = max(s, block_max[n]);  // a NaN score is left to the exponential
    });
  }
  Vec<T> base[kVectors], sum[kVectors] = {};  // of this block alone: long rows lose less that way
  unroll<kVectors>(UNROLLED(n) {
    const Vec<T> old_max = load(state.maximum + n * kLanes<T>);
    const Vec<T> new_max = max(block_max[n] * splat<T>(exp_scale), old_max);
    base[n] = finite_or_zero<T>(new_max);
    const Vec<T> rescale = exp2<T>((old_max - base[n]) * splat<T>(static_cast<T>(kLog2E)));
    store(state.maximum + n * kLanes<T>, new_max);
    store(state.sum + n * kLanes<T>, load(state.sum + n * kLanes<T>) * rescale);
    store(factor + n * kLanes<T>, rescale);
  });
  if (any_far_from_zero<T>(base)) {
    for (int64_t r = 0; r < rows; ++r) {
      unroll<kVectors>(UNROLLED(n) {
        T* lanes = score.row(r) + n * kLanes<T>;
        store(lanes, load(lanes) * splat<T>(exp_scale) - base[n]);
      });
    }
    exp_scale = 1;
    unroll<kVectors>(UNROLLED(n) { base[n] = Vec<T>{}; });
  }
  const Vec<T> unit = splat<T>(exp_scale * static_cast<T>(kLog2E));
  unroll<kVectors>(UNROLLED(n) { base[n] *= splat<T>(static_cast<T>(kLog2E)); });
  const auto weight = [&](int64_t r, auto n) __attribute__((always_inline)) {
    const Vec<T> w = C::exponential(fma(load(score.row(r) + n * kLanes<T>), unit, -base[n]));
    sum[n] += w;
    return w;
  };
  int64_t done = 0;
  if constexpr (C::kPair == 2) {
    for (; pairs.data && done < rows; done += 2) {
      const bool both = done + 1 < rows;
      unroll<kVectors>(UNROLLED(n) {
        const Vec<T> first = weight(done, n), second = both ? weight(done + 1, n) : Vec<T>{};
        C::store_pair(pairs.row(done / 2) + n * kLanes<T>, first, second);
      });
    }
  }
  for (; done < rows; ++done) {
    unroll<kVectors>(UNROLLED(n) { store(score.row(done) + n * kLanes<T>, weight(done, n)); });
  }
  unroll<kVectors>(UNROLLED(n) {
    T* total = state.sum + n * kLanes<T>;
    store(total, load(total) + sum[n]);
  });
}

}  // namespace
}  // namespace attention_ext
