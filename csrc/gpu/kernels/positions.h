// The query and key of each number in a lane's fragments, and the mods applied there.
#pragma once

#include "core/philox.h"
#include "core/score_mods.h"
#include "gpu/kernels/products.h"

namespace attention_ext {
namespace {

// The arithmetic of core/score_mods.h over single numbers.
template <class T>
struct NumberOps {
  using V = T;
  using Mask = bool;

  ATTENTION_DEVICE static T splat(double x) { return static_cast<T>(x); }
  ATTENTION_DEVICE static T abs(T x) { return larger(x, -x); }
  ATTENTION_DEVICE static T tanh(T x) { return tanh_of(x); }
  ATTENTION_DEVICE static T select(bool mask, T a, T b) { return mask ? a : b; }
};

template <class T>
ATTENTION_DEVICE constexpr T infinity() {
  return static_cast<T>(__builtin_inf());
}

// Kernels are compiled for two modes: masks by position at most, or everything, dropout included.
inline ScoreMode score_mode_of(const AttentionProblem& p) {
  return score_mods_of(p).folds_scale_into_exp() && p.dropout_p == 0 ? ScoreMode::kMask : ScoreMode::kAll;
}

// One head of one sequence.
struct Head {
  Sequence sequence;
  int64_t head, kv_head;
  ScoreMods mods;
  int diagonal, length_q, length_k;  // of the sequence, for inner loops

  ATTENTION_DEVICE Head(const AttentionProblem& p, int64_t batch, int64_t h)
      : sequence(sequence_of(p, batch)),
        head(h),
        kv_head(h / p.group_size()),
        mods(score_mods_of(p, sequence, h)),
        diagonal(static_cast<int>(sequence.diagonal)),
        length_q(static_cast<int>(sequence.length_q)),
        length_k(static_cast<int>(sequence.length_k)) {}
};

// The first query and key of a warp's block of scores, within the sequence.
struct Corner {
  int q, k;
};

// A number of attn_mask, of the problem's own precision or narrower, as it is added to a score.
template <class T>
ATTENTION_DEVICE T read_mask(const View& view, int64_t at) {
  if (view.dtype == DType::kBool) return static_cast<const bool*>(view.data)[at] ? T(0) : -infinity<T>();
  if constexpr (sizeof(T) == 8) {
    return static_cast<const double*>(view.data)[at];
  } else {
    if (view.dtype == DType::kBFloat16) return widen(static_cast<const BFloat16*>(view.data)[at]);
    if (view.dtype == DType::kFloat16) return widen(static_cast<const Half*>(view.data)[at]);
    return static_cast<const float*>(view.data)[at];
  }
}

// A block of scores, 16 kRowTiles rows by 8 kTiles columns. Rows are queries, or keys where kTransposed.
template <class T, ScoreMode kMode, bool kTransposed = false>
struct ScoreBlock {
  const AttentionProblem& p;
  const Head& head;
  Corner corner;
  bool partial;  // whether a mask or the end of the keys hides some of the block

  ATTENTION_DEVICE int query(int m, int n, int i) const { return corner.q + (kTransposed ? column(n, i) : row(m, i)); }
  ATTENTION_DEVICE int key(int m, int n, int i) const { return corner.k + (kTransposed ? row(m, i) : column(n, i)); }

  // Corners lie at whole octets of keys.
  ATTENTION_DEVICE int octet(int m, int n, int i) const {
    return corner.k / kKeysPerPhilox + (kTransposed ? m * kFragmentRows / kKeysPerPhilox + i / 2 : n);
  }

  ATTENTION_DEVICE Position<NumberOps<T>> at(int q, int k) const {
    const auto distance = static_cast<T>(k - q - head.diagonal);
    return {distance, kMode == ScoreMode::kAll && head.mods.reads_bias() ? number_of(p.attn_mask, q, k) : T(0)};
  }

  ATTENTION_DEVICE bool outside(int k) const { return k >= head.length_k; }

  // From a view that is broadcast like attn_mask; lanes past the end repeat the last row and column.
  ATTENTION_DEVICE T number_of(const View& view, int q, int k) const {
    const int64_t row = minimum(q, head.length_q - 1), column = minimum(k, head.length_k - 1);
    return read_mask<T>(view, head.sequence.batch * view.stride_b + head.head * view.stride_h + row * view.stride_row +
                                  column * view.stride_col);
  }

  ATTENTION_DEVICE bool changes_scores() const { return kMode == ScoreMode::kAll || partial; }

  // dot becomes the score, -inf where the key is hidden. With ScoreMode::kMask the scale is folded into the
  // exponential.
  ATTENTION_DEVICE ModifiedScore<NumberOps<T>> score(T dot, int q, int k) const {
    using Ops = NumberOps<T>;
    ModifiedScore<Ops> modified{dot, T(1), T(0)};
    if constexpr (kMode == ScoreMode::kAll) {
      const auto position = at(q, k);
      modified = head.mods.score_mod<Ops>(dot, position);
      modified.score = outside(k) ? -infinity<T>() : head.mods.masked<Ops>(modified.score, position);
    } else {
      modified.score = outside(k) ? -infinity<T>() : head.mods.masks.masked<Ops>(dot, at(q, k));
    }
    return modified;
  }

  // The factor that the exponential applies to scores.
  ATTENTION_DEVICE T exp_scale() const { return kMode == ScoreMode::kAll ? T(1) : static_cast<T>(head.mods.scale); }

 private:
  ATTENTION_DEVICE static int row(int m, int i) { return m * kFragmentRows + i / 2 * 8 + lane_group(); }
  ATTENTION_DEVICE static int column(int n, int i) { return n * kFragmentColumns + i % 2 + 2 * lane_member(); }
};

// Whether a mask or the end of the keys hides some of a block of scores.
ATTENTION_DEVICE bool is_partial(const Head& head, Range q, Range k) {
  return k.end > head.length_k || head.mods.masks.block_mask(q, k, head.diagonal) != BlockMask::kFull;
}

}  // namespace
}  // namespace attention_ext
