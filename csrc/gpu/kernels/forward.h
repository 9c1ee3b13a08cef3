// softmax(scores) value by online softmax: a block of threads loops over the keys for a tile of queries, a warp for
// some of its rows. With few queries the keys are split over several blocks, whose sums decode.h merges.
#pragma once

#include "gpu/kernels/dropout.h"
#include "gpu/kernels/softmax.h"
#include "gpu/kernels/sources.h"
#include "gpu/reasons.h"

namespace attention_ext {
namespace {

enum class Part : uint8_t { kWhole, kSplit };

// Per split and query, (split, batch, head, query): the softmax state and the unnormalised out.
template <class T>
struct SplitKvWorkspace {
  T *maximum, *sum, *sums;

  ATTENTION_DEVICE SplitKvWorkspace(const AttentionProblem& p, void* workspace)
      : maximum(static_cast<T*>(workspace)), sum(maximum + rows(p)), sums(sum + rows(p)) {}

  ATTENTION_INLINE static int64_t parts(const AttentionProblem& p) { return ceil_div(p.max_seqlen_k, kKeysPerPart); }
  ATTENTION_INLINE static int64_t rows_of_part(const AttentionProblem& p) { return p.batch * p.heads * p.max_seqlen_q; }
  ATTENTION_INLINE static int64_t rows(const AttentionProblem& p) { return parts(p) * rows_of_part(p); }
  static size_t bytes(const AttentionProblem& p) {
    return static_cast<size_t>(rows(p) * (2 + p.head_dim_v)) * sizeof(T);
  }
};

template <class C, int kDim, ScoreMode kMode, Part kPart = Part::kWhole>
class Forward {
  using T = typename C::Scalar;
  using E = typename C::Element;
  using Shape = ForwardShape<C, kDim, kMode>;
  static constexpr int kRowTiles = Shape::kRowTiles, kKeyTiles = Shape::kColumns / kFragmentColumns;
  static constexpr int kQueries = Shape::kWarps * kRowTiles * kFragmentRows;
  using QueryTile = SharedTile<E, kQueries, kDim>;
  using KeyTile = SharedTile<E, Shape::kRows, kDim>;
  using KeyTiles = TileSet<KeyTile, 2>;
  using Scores = Fragments<T, kRowTiles, kKeyTiles>;
  using Sums = Fragments<T, kRowTiles, kDim / kFragmentColumns>;

 public:
  using Problem = ForwardProblem;
  static constexpr int kThreads = Shape::kWarps * kWarpSize;
  static constexpr size_t kSharedBytes = QueryTile::kBytes + Shape::kStages * KeyTiles::kBytes;
  static_assert(kSharedBytes <= (Shape::kRowBytes <= 1024 ? kFewSharedBytes : kMostSharedBytes));

  static int64_t blocks(const AttentionProblem& p) {
    return QueryTileIndex::count(p, kQueries) * (kPart == Part::kSplit ? SplitKvWorkspace<T>::parts(p) : 1);
  }

  ATTENTION_DEVICE static void run(const ForwardProblem& p, void* workspace) {
    const int64_t whole = QueryTileIndex::count(p, kQueries);
    const QueryTileIndex at(p, kQueries, block_index() % whole);
    const Head head = head_of(p, at);
    const Range q = at.queries(head.sequence, kQueries);
    if (!q.empty()) Forward(p, head, q, block_index() / whole).mainloop(workspace);
  }

 private:
  ATTENTION_DEVICE Forward(const ForwardProblem& p, const Head& head, Range q, int64_t part)
      : p_(p),
        head_(head),
        q_(q),
        part_(part),
        row_(thread_index() / kWarpSize * kRowTiles * kFragmentRows),
        exponential_(exponential_of(p)) {}

  // The scale is folded into the exponential wherever it can be, so that dropout, which alone calls for ScoreMode::kAll
  // too, changes no bit of logsumexp.
  ATTENTION_DEVICE static Head head_of(const ForwardProblem& p, const QueryTileIndex& at) {
    Head head(p, at.batch, at.head);
    if (score_mods_of(p).folds_scale_into_exp()) head.mods.scale = 1.0;
    return head;
  }
  ATTENTION_DEVICE static Exponential<T> exponential_of(const ForwardProblem& p) {
    const bool folds_scale = kMode == ScoreMode::kMask || score_mods_of(p).folds_scale_into_exp();
    return {folds_scale ? static_cast<T>(p.scale) : T(1), !folds_scale};
  }

  ATTENTION_DEVICE void mainloop(void* workspace) {
    const TileSet<QueryTile, 1> query(shared_memory());
    copy_set<kThreads>(query, Sources<E, 1>{{head_rows<E>(head_, p_.query, p_.head_dim)}}, static_cast<int>(q_.begin),
                       Span(q_));
    prologue();
    const int rows = q_.begin + row_ < q_.end ? Shape::kRows : 0;  // a warp without queries only helps to copy
    const auto add_tiles = [&](int k, const KeyTiles& tiles, int) {
      for (int row = 0; row < rows; row += Shape::kColumns) add_block(query.tile[0], k + row, tiles, row);
    };
    stream_rows<kThreads, Shape::kStages, KeyTile>(shared_memory() + query.kBytes, key_sources<E>(p_, head_), keys(),
                                                   add_tiles);
    if constexpr (kPart == Part::kSplit) {
      store_part(SplitKvWorkspace<T>(p_, workspace));
    } else {
      epilogue();
    }
  }

  ATTENTION_DEVICE Range keys() const {
    const Range seen = visible_keys(p_, head_.sequence, q_);
    if (kPart == Part::kWhole) return seen;
    return {maximum(seen.begin, part_ * kKeysPerPart), minimum(seen.end, (part_ + 1) * kKeysPerPart)};
  }

  ATTENTION_DEVICE void prologue() {
    const bool has_sink = p_.sinks && part_ == 0;
    const double sink = has_sink ? p_.sinks[head_.sequence.batch * p_.sinks_stride_b + head_.head] : -__builtin_inf();
    const T sink_weight = has_sink && lane_member() == 0 ? T(1) : T(0);
    sums_.clear();
    ATTENTION_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      rows_[m] = {{static_cast<T>(sink), static_cast<T>(sink)}, {sink_weight, sink_weight}};
    }
  }

  ATTENTION_DEVICE void add_block(const QueryTile& query, int k, const KeyTiles& tiles, int row) {
    const ScoreBlock<T, kMode> block{
        p_, head_, {static_cast<int>(q_.begin) + row_, k}, is_partial(head_, q_, {k, k + Shape::kColumns})};
    Scores score;
    score.clear();
    multiply_rows<C>(score, TileRows<C, QueryTile>{query, row_}, tiles.tile[0], row);
    bool any = false;
    ATTENTION_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      if (block.changes_scores()) {
        for_each_number<kKeyTiles>([&](int n, int i) {
          T& s = score.tile[m][n].number[i];
          s = block.score(s, block.query(m, n, i), block.key(m, n, i)).score;
        });
      }
      T rescale[2];
      any |= softmax_rows(score.tile[m], exponential_, rows_[m], rescale);
      if (any_in_warp(rescale[0] != T(1) || rescale[1] != T(1))) {
        for_each_number<Sums::kTileCount>([&](int n, int i) { sums_.tile[m][n].number[i] *= rescale[i / 2]; });
      }
    }
    // Keys that are hidden from all these rows may hold anything.
    if (block.changes_scores() && !any_in_warp(any)) return;
    if constexpr (kMode == ScoreMode::kAll) drop(block, score);
    multiply_weights<C>(sums_, score, tiles.tile[1], row);
  }

  ATTENTION_DEVICE void drop(const ScoreBlock<T, kMode>& block, Scores& weight) {
    const Dropout dropout = dropout_of(p_);
    if (!dropout.present) return;
    for_each_kept<kRowTiles, kKeyTiles>(block, dropout, [&](int m, int n, int i, bool kept) {
      if (!kept) weight.tile[m][n].number[i] = T(0);
    });
  }

  ATTENTION_DEVICE void epilogue() {
    const Rows<E> out = head_rows<E>(head_, p_.out, p_.head_dim_v);
    T* logsumexp = static_cast<T*>(p_.logsumexp) + row_of(p_, head_.sequence, head_.head);
    const T kept_scale = kMode == ScoreMode::kAll ? static_cast<T>(dropout_of(p_).kept_scale) : T(1);
    ATTENTION_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      T factor[2];
      ATTENTION_UNROLL
      for (int r = 0; r < 2; ++r) {
        const T sum = sum_of_group(rows_[m].sum[r]);
        const int64_t q = q_.begin + row_ + m * kFragmentRows + r * 8 + lane_group();
        factor[r] = sum == T(0) ? T(0) : kept_scale / sum;
        if (lane_member() == 0 && q < q_.end) {
          logsumexp[q] = multiply_add(log2_of(sum), static_cast<T>(kLn2), rows_[m].maximum[r]);
        }
      }
      store_rows(out, q_.begin + row_ + m * kFragmentRows, q_.end, sums_.tile[m], factor);
    }
  }

  ATTENTION_DEVICE void store_part(const SplitKvWorkspace<T>& memory) {
    const int64_t head = (part_ * p_.batch + head_.sequence.batch) * p_.heads + head_.head,
                  first = head * p_.max_seqlen_q;
    const Rows<T> sums{memory.sums + first * p_.head_dim_v, p_.head_dim_v, 1, static_cast<int>(p_.head_dim_v)};
    const T factor[2] = {T(1), T(1)};
    ATTENTION_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      ATTENTION_UNROLL
      for (int r = 0; r < 2; ++r) {
        const T sum = sum_of_group(rows_[m].sum[r]);
        const int64_t q = q_.begin + row_ + m * kFragmentRows + r * 8 + lane_group();
        if (lane_member() != 0 || q >= q_.end) continue;
        memory.maximum[first + q] = rows_[m].maximum[r];
        memory.sum[first + q] = sum;
      }
      store_rows(sums, q_.begin + row_ + m * kFragmentRows, q_.end, sums_.tile[m], factor);
    }
  }

  const ForwardProblem& p_;
  const Head& head_;
  const Range q_;
  const int64_t part_;
  const int row_;  // of the tile, the warp's first
  const Exponential<T> exponential_;
  Sums sums_;
  RowState<T> rows_[kRowTiles];
};

template <class C>
KernelPlan plan_forward_by_shape(const AttentionProblem& p) {
  return with_shape<FirstOrderDims<C>>(p, [&](auto dim, auto mode) {
    using Kernel = Forward<C, dim, mode>;
    KernelPlan plan;
    add_launch<Kernel>(plan, Kernel::blocks(p));
    return plan;
  });
}

}  // namespace
}  // namespace attention_ext
