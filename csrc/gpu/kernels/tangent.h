// Logsumexp as the passes after forward read it, and tangents of scores.
#pragma once

#include "gpu/kernels/softmax.h"

namespace attention_ext {
namespace {

// Of one head; queries past the end, and those that see no key, have logsumexp +inf, which makes every weight 0.
template <class T>
struct LogsumexpRows {
  const T* data;
  int end;

  ATTENTION_DEVICE LogsumexpRows(const AttentionProblem& p, const Head& head, const void* logsumexp)
      : data(static_cast<const T*>(logsumexp) + row_of(p, head.sequence, head.head)),
        end(static_cast<int>(head.sequence.length_q)) {}

  ATTENTION_DEVICE T row(int q) const { return q >= end || data[q] == -infinity<T>() ? infinity<T>() : data[q]; }
};

// Of the scores of 16 rows. dots: the tangents of query . key, which become those of scale * query . key.
template <class T, ScoreMode kMode, bool kTransposed, int kTiles>
ATTENTION_DEVICE typename VectorOps<T, kTiles>::V score_tangents(const Tangents& tangent,
                                                                 const ScoreBlock<T, kMode, kTransposed>& block,
                                                                 const ModifiedScore<VectorOps<T, kTiles>>& scores,
                                                                 Fragment<T> (&dots)[kTiles]) {
  using Ops = VectorOps<T, kTiles>;
  const auto scale = static_cast<T>(block.head.mods.scale);
  auto tangents = Ops::of([&](int n, int i) { return dots[n].number[i] *= scale; });
  if constexpr (kMode != ScoreMode::kAll) return tangents;
  tangents = tangents * scores.softcap_grad;
  if (tangent.attn_mask) {
    block.template for_each_number_of<kTiles>(tangent.attn_mask,
                                              [&](int n, int i, T x) { tangents.number[4 * n + i] += x; });
  }
  if (tangent.alibi_slopes) {
    const double slope = tangent.alibi_slopes[block.head.sequence.batch * block.p.heads + block.head.head];
    const int lane = reread_lane_index();
    const auto distance = [&](int n, int i) {
      return block.at(block.query(0, n, i, lane), block.key(0, n, i, lane)).distance;
    };
    const Position<Ops> position{Ops::of(distance), Ops::splat(0.0)};
    tangents = tangents + Ops::splat(slope) * block.head.mods.alibi.template slope_grad<Ops>(position);
  }
  return tangents;
}

// Hidden keys have nothing to do with derivatives, whatever they hold.
template <class T, int kTiles>
ATTENTION_DEVICE void hide(Fragment<T> (&x)[kTiles], const ModifiedScore<VectorOps<T, kTiles>>& scores) {
  for_each_number<kTiles>([&](int n, int i) {
    T& number = x[n].number[i];
    number = scores.score.number[4 * n + i] == -infinity<T>() ? T(0) : number;
  });
}

template <class T, int kRowTiles, int kTiles>
ATTENTION_DEVICE bool any_of(const Fragments<T, kRowTiles, kTiles>& x) {
  bool any = false;
  for_each_number<kRowTiles, kTiles>([&](int m, int n, int i) { any |= x.tile[m][n].number[i] != T(0); });
  return any;
}

}  // namespace
}  // namespace attention_ext
