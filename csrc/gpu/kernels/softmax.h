// Online softmax over blocks of keys (Milakov & Gimelshein, arXiv 1805.02867), in base 2. The four lanes of a group
// share its rows.
#pragma once

#include "gpu/kernels/positions.h"

namespace attention_ext {
namespace {

// Of rows group and group + 8.
template <class T>
struct RowState {
  T maximum[2];  // of the scores so far, -inf before the first visible key
  T sum[2];      // of exp(score - maximum), this lane's columns alone
};

template <class T>
ATTENTION_DEVICE T largest_of_group(T x) {
  x = larger(x, shuffle_xor(x, 1));
  return larger(x, shuffle_xor(x, 2));
}

template <class T>
ATTENTION_DEVICE T sum_of_group(T x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

template <class T>
ATTENTION_DEVICE T finite_or_zero(T maximum) {
  return maximum == -infinity<T>() ? T(0) : maximum;
}

// exp(scale * score - base). Where mods add to scores, a bias of -1e10 or -1e30, as many models mask, would leave no
// digit of log2(e) * base: there differences come first.
template <class T>
class Exponential {
  static constexpr T kUnit = static_cast<T>(kLog2E);

 public:
  ATTENTION_DEVICE Exponential(T scale, bool mods_add)
      : scale_(scale), early_(mods_add ? T(1) : kUnit), late_(mods_add ? kUnit : T(1)) {}

  ATTENTION_DEVICE T scale() const { return scale_; }
  ATTENTION_DEVICE T operator()(T score, T base) const {
    return exp2_of(multiply_add(score, scale_ * early_, -base * early_) * late_);
  }

 private:
  T scale_, early_, late_;
};

// The exponential and the mods of a forward pass. The scale is folded into the exponential wherever it can be, so that
// dropout, which alone calls for ScoreMode::kAll too, changes no bit of logsumexp.
template <ScoreMode kMode, class T>
ATTENTION_DEVICE Exponential<T> exponential_of(const AttentionProblem& p) {
  const bool folds_scale = kMode == ScoreMode::kMask || score_mods_of(p).folds_scale_into_exp();
  return {folds_scale ? static_cast<T>(p.scale) : T(1), !folds_scale};
}
template <ScoreMode kMode, class T>
ATTENTION_DEVICE Head folded_head(const AttentionProblem& p, int64_t batch, int64_t h) {
  Head head(p, batch, h);
  if (score_mods_of(p).folds_scale_into_exp()) head.mods.scale = 1.0;
  return looped<kMode, T>(head);
}

template <ScoreMode kMode, class T>
ATTENTION_DEVICE T weight_of(T score, T scale, T base) {
  return Exponential<T>(scale, kMode == ScoreMode::kAll)(score, base);
}

// Scores of 16 rows become unnormalised weights; `rescale` is the factor for earlier sums of the rows. True where the
// block holds any weight for this lane.
template <class T, int kTiles>
ATTENTION_DEVICE bool softmax_rows(Fragment<T> (&score)[kTiles], const Exponential<T>& exponential, RowState<T>& state,
                                   T (&rescale)[2]) {
  bool any = false;
  ATTENTION_UNROLL
  for (int r = 0; r < 2; ++r) {
    T block_max = -infinity<T>();
    ATTENTION_UNROLL
    for (int n = 0; n < kTiles; ++n)
      block_max = larger(larger(score[n].number[2 * r], score[n].number[2 * r + 1]), block_max);
    const T new_max = larger(largest_of_group(block_max) * exponential.scale(), state.maximum[r]),
            base = finite_or_zero(new_max);
    rescale[r] = exp2_of((state.maximum[r] - base) * static_cast<T>(kLog2E));
    state.maximum[r] = new_max;
    T sum = 0;
    ATTENTION_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      ATTENTION_UNROLL
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        score[n].number[i] = exponential(score[n].number[i], base);
        sum += score[n].number[i];
      }
    }
    any |= sum != T(0);
    state.sum[r] = multiply_add(state.sum[r], rescale[r], sum);
  }
  return any;
}

}  // namespace
}  // namespace attention_ext
