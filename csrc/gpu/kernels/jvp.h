// Tangents of out and logsumexp (forward mode). With prob P, score tangent S' and m = rowsum(P S'):
//   logsumexp' = m (a sink's own tangent included),   out' = (P S') value + P value' - m out
// P is after dropout in out', before it in m.
#pragma once

#include "gpu/kernels/backward_memory.h"
#include "gpu/kernels/gradient.h"

namespace attention_ext {
namespace {

template <class C, int kDim, ScoreMode kMode>
class Jvp {
  using T = typename C::Scalar;
  using E = typename C::Element;
  using Shape = GradientShape<C, kDim, Order::kSecond, ScoreMode::kMask>;
  static constexpr int kQueries = Shape::kWarps * kFragmentRows, kTiles = Shape::kColumns / kFragmentColumns;
  using QueryTile = SharedTile<E, kQueries, kDim>;
  using QueryTiles = TileSet<QueryTile, 2>;
  using OwnQueries = OwnRows<C, QueryTile, 2, Shape::kHoldsOwn>;
  using KeyTile = SharedTile<E, Shape::kRows, kDim>;
  using KeyTiles = TileSet<KeyTile, 4>;
  using Scores = Fragments<T, 1, kTiles>;
  using Sums = Fragments<T, 1, kDim / kFragmentColumns>;

 public:
  using Problem = JvpProblem;
  static constexpr int kThreads = Shape::kWarps * kWarpSize;
  static constexpr size_t kSharedBytes =
      maximum(QueryTiles::kBytes, OwnQueries::kBytes + Shape::kStages * KeyTiles::kBytes);
  static_assert(kSharedBytes <= Shape::kSharedBytesAllowed);

  static int64_t blocks(const AttentionProblem& p) { return QueryTileIndex::count(p, kQueries); }

  ATTENTION_DEVICE static void run(const Problem& p, void* workspace) {
    const QueryTileIndex at(p, kQueries);
    const Head head = looped<kMode, T>(Head(p, at.batch, at.head));
    const Range q = at.queries(head.sequence, kQueries);
    if (!q.empty()) Jvp(p, head, q).mainloop(workspace);
  }

 private:
  ATTENTION_DEVICE Jvp(const Problem& p, const Head& head, Range q)
      : p_(p), head_(head), q_(q), row_(thread_index() / kWarpSize * kFragmentRows), dropout_(dropout_by<kMode, T>(p)) {
    const LogsumexpRows<T> source(p, head, p.logsumexp);
    for (int r = 0; r < 2; ++r) logsumexp_[r] = source.row(static_cast<int>(query(r)));
  }

  ATTENTION_DEVICE int64_t query(int r) const { return q_.begin + row_ + r * 8 + lane_group(); }

  ATTENTION_DEVICE void mainloop(void* workspace) {
    sums_.clear();
    const QueryTiles queries(shared_memory());
    const Sources<E, 2> sources{
        {head_rows<E>(head_, p_.query, p_.head_dim), head_rows<E>(head_, p_.tangent.query, p_.head_dim)}};
    copy_set<kThreads>(queries, sources, static_cast<int>(q_.begin), Span(q_));
    OwnQueries own(queries, row_);
    own.load();
    const int rows = q_.begin + row_ < q_.end ? Shape::kRows : 0;  // a warp without queries only helps to copy
    const auto add_tiles = [&](int k, const KeyTiles& keys, int) {
      for (int row = 0; row < rows; row += Shape::kColumns) add_block(own, k + row, keys, row);
    };
    stream_rows<kThreads, Shape::kStages, KeyTile>(
        shared_memory() + OwnQueries::kBytes, key_sources<E>(p_, head_), visible_keys(p_, head_.sequence, q_),
        seen_keys<kMode, KeyTile::kRows>(p_, head_, head_.heads(), q_), add_tiles);
    epilogue(workspace);
  }

  ATTENTION_DEVICE void add_block(const OwnQueries& own, int k, const KeyTiles& keys, int row) {
    const auto block = ScoreBlock<T, kMode>::template of<kTiles>(
        p_, head_, {static_cast<int>(q_.begin) + row_, k}, is_partial<kMode>(p_, head_, q_, {k, k + Shape::kColumns}));
    Scores weight, dot_tangent;
    weight.clear();
    dot_tangent.clear();
    if (p_.tangent.query) {
      multiply_rows<C>(weight, own[0], dot_tangent, own[1], keys.tile[0], row);
    } else {
      multiply_rows<C>(weight, own[0], keys.tile[0], row);
    }
    if (p_.tangent.key) multiply_rows<C>(dot_tangent, own[0], keys.tile[2], row);
    // Keys that are hidden from all these rows may hold anything.
    if (!any_in_warp(differentiate(block, weight, dot_tangent))) return;
    multiply_weights<C>(sums_, dot_tangent, keys.tile[1], row);
    if (p_.tangent.value) multiply_weights<C>(sums_, weight, keys.tile[3], row);
  }

  // weight, dot_tangent: query . key and its tangent, before the scale, become P and P S', 0 where dropped. False where
  // all are 0 in a block that hides some keys.
  ATTENTION_DEVICE bool differentiate(const ScoreBlock<T, kMode>& block, Scores& weight, Scores& dot_tangent) {
    T means[2] = {};
    const auto scores = block.scores(weight.tile[0]);
    if (kMode != ScoreMode::kAll && block.partial) hide(dot_tangent.tile[0], scores);
    const auto tangents = score_tangents(p_.tangent, block, scores, dot_tangent.tile[0]);
    for_each_kept<1, kTiles>(block, dropout_, [&](int, int n, int i, bool kept) {
      const T prob = weight_of<kMode>(score_at(scores, n, i).score, block.exp_scale(), logsumexp_[i / 2]);
      const bool hidden = kMode == ScoreMode::kAll && prob == T(0);
      const T product = hidden ? T(0) : prob * tangents.number[4 * n + i];
      means[i / 2] += product;
      weight.tile[0][n].number[i] = kept ? prob : T(0);
      dot_tangent.tile[0][n].number[i] = kept ? product : T(0);
    });
    for (int r = 0; r < 2; ++r) means_[r] += means[r];
    return !block.changes_scores() || any_of(weight);
  }

  ATTENTION_DEVICE void epilogue(void* workspace) {
    T deltas[2] = {};
    ATTENTION_UNROLL
    for (int r = 0; r < 2; ++r) {
      means_[r] = sum_of_group(means_[r]) + sink_mean(logsumexp_[r]);
      if (query(r) < q_.end) deltas[r] = finish_row(r);
      deltas[r] = sum_of_group(deltas[r]);
      if (query(r) >= q_.end || lane_member() != 0) continue;
      const int64_t row = row_of(p_, head_.sequence, head_.head) + query(r);
      static_cast<T*>(p_.logsumexp_tangent)[row] = means_[r];
      if (p_.wants_gradients()) BackwardMemory<T>(p_, workspace).delta_tangent[row] = deltas[r];
    }
    if (!p_.out_tangent) return;
    const T factor[2] = {T(1), T(1)};
    store_rows(head_rows<E>(head_, p_.out_tangent, p_.head_dim_v), q_.begin + row_, q_.end, sums_.tile[0], factor);
  }

  ATTENTION_DEVICE T sink_mean(T logsumexp) const {
    if (!p_.tangent.sinks) return T(0);
    const int64_t b = head_.sequence.batch;
    const double sink = p_.sinks[b * p_.sinks_stride_b + head_.head];
    const double prob = exp2_of((sink - static_cast<double>(logsumexp)) * kLog2E);
    return static_cast<T>(prob * p_.tangent.sinks[b * p_.heads + head_.head]);
  }

  // Sums become out'. Returns this lane's part of rowsum(grad_out * out'), where gradients need it.
  ATTENTION_DEVICE T finish_row(int r) {
    const auto kept_scale = static_cast<T>(dropout_.kept_scale);
    Fragment<T>(&sums)[Sums::kTileCount] = sums_.tile[0];
    for_each_column<Sums::kTileCount>(head_rows<E>(head_, p_.out, p_.head_dim_v), query(r),
                                      [&](int n, int i, const E& out) {
                                        T& sum = sums[n].number[2 * r + i];
                                        sum = sum * kept_scale - means_[r] * widen(out);
                                      });
    T delta = 0;
    if (p_.wants_gradients()) {
      for_each_column<Sums::kTileCount>(head_rows<E>(head_, p_.grad_out, p_.head_dim_v), query(r),
                                        [&](int n, int i, const E& grad_out) {
                                          delta = multiply_add(sums[n].number[2 * r + i], widen(grad_out), delta);
                                        });
    }
    return delta;
  }

  const Problem& p_;
  const Head& head_;
  const Range q_;
  const int row_;  // of the tile, the warp's first
  const Dropout dropout_;
  T logsumexp_[2], means_[2] = {};
  Sums sums_;
};

// Second order takes seven tiles at once: with 2 KB a row they fill more than there is.
template <class C>
using SecondOrderDims =
    std::conditional_t<sizeof(typename C::Element) == 8, HeadDims<32, 64, 128>, HeadDims<32, 64, 128, 256>>;

template <class C>
KernelPlan plan_jvp_by_shape(const AttentionProblem& p) {
  return with_shape<SecondOrderDims<C>>(p, [&](auto dim, auto mode) {
    using Kernel = Jvp<C, dim, mode>;
    KernelPlan plan;
    add_launch<Kernel>(plan, Kernel::blocks(p));
    return plan;
  });
}

}  // namespace
}  // namespace attention_ext
