// softmax(scores) value by online softmax: a block of threads loops over the keys for a tile of queries, a warp for
// some of its rows. Where tiles are few, several blocks share the keys of each (key_parts.h).
#pragma once

#include "gpu/kernels/dropout.h"
#include "gpu/kernels/key_parts.h"
#include "gpu/kernels/sources.h"

namespace attention_ext {
namespace {

enum class Part : uint8_t { kWhole, kSplit };

template <class C, int kDim, ScoreMode kMode, Part kPart = Part::kWhole>
class Forward {
  using T = typename C::Scalar;
  using E = typename C::Element;
  // A part takes a few registers more than the highest tiles leave.
  using Shape = ForwardShape<C, kDim, kPart == Part::kSplit ? ScoreMode::kAll : kMode>;
  static constexpr int kRowTiles = Shape::kRowTiles, kKeyTiles = Shape::kColumns / kFragmentColumns;
  static constexpr int kQueries = Shape::kQueries;
  using QueryTile = SharedTile<E, kQueries, kDim>;
  using KeyTile = StreamedTile<C, Shape, kDim>;
  using KeyTiles = TileSet<KeyTile, 2>;
  using Scores = Fragments<T, kRowTiles, kKeyTiles>;
  using Sums = Fragments<T, kRowTiles, kDim / kFragmentColumns>;

 public:
  using Problem = ForwardProblem;
  // Those by which parts are counted, the same in all modes, so that dropout changes no bit of logsumexp.
  using Tiles = QueryTiles<ForwardShape<C, kDim, ScoreMode::kMask>::kQueries>;
  static constexpr int kThreads = Shape::kWarps * kWarpSize;
  static constexpr size_t kSharedBytes = QueryTile::kBytes + kStreamBytes<KeyTile, 2, Shape::kStages>;
  static_assert(kSharedBytes <= (Shape::kRowBytes <= 1024 ? kFewSharedBytes : kMostSharedBytes));

  static int64_t blocks(const AttentionProblem& p) {
    return QueryTileIndex::count(p, kQueries) * (kPart == Part::kSplit ? Tiles::parts(p) : 1);
  }

  ATTENTION_DEVICE static void run(const ForwardProblem& p, void* workspace) {
    const int64_t tiles = QueryTileIndex::count(p, kQueries);
    const QueryTileIndex at(p, kQueries, block_index() % tiles);
    const Head head = folded_head<kMode, T>(p, at.batch, at.head);
    const Range q = at.queries(head.sequence, kQueries);
    if (!q.empty()) Forward(p, head, q, static_cast<int>(block_index() / tiles)).mainloop(workspace);
  }

 private:
  ATTENTION_DEVICE Forward(const ForwardProblem& p, const Head& head, Range q, int part)
      : p_(p),
        head_(head),
        q_(q),
        part_(part),
        row_(thread_index() / kWarpSize * kRowTiles * kFragmentRows),
        exponential_(exponential_of<kMode, T>(p)),
        dropout_(dropout_by<kMode, T>(p)) {}

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
                                                   seen_keys<kMode, KeyTile::kRows>(p_, head_, head_.heads(), q_),
                                                   add_tiles);
    if constexpr (kPart == Part::kSplit) {
      store_part(PartsWorkspace<T>(p_, workspace));
    } else {
      epilogue();
    }
  }

  ATTENTION_DEVICE Range keys() const {
    const Range seen = visible_keys(p_, head_.sequence, q_);
    return kPart == Part::kWhole ? seen : part_of_keys(seen, KeyTile::kRows, part_, Tiles::parts(p_));
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
    const auto block = ScoreBlock<T, kMode>::template of<kKeyTiles>(
        p_, head_, {static_cast<int>(q_.begin) + row_, k}, is_partial<kMode>(p_, head_, q_, {k, k + Shape::kColumns}));
    Scores score;
    score.clear();
    multiply_rows<C>(score, TileRows<C, QueryTile>{query, row_}, tiles.tile[0], row);
    bool any = false;
    ATTENTION_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      if (block.changes_scores()) {
        const auto changed = block.scores(score.tile[m], m).score;
        for_each_number<kKeyTiles>([&](int n, int i) { score.tile[m][n].number[i] = changed.number[4 * n + i]; });
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
    if (!dropout_.present) return;
    for_each_kept<kRowTiles, kKeyTiles>(block, dropout_, [&](int m, int n, int i, bool kept) {
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

  ATTENTION_DEVICE void store_part(const PartsWorkspace<T>& memory) {
    const int64_t first = row_of(p_, head_.sequence, head_.head);
    const Rows<T> sums{memory.sums(part_, first), memory.width(p_), 1, p_.head_dim_v};
    const T factor[2] = {T(1), T(1)};
    ATTENTION_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      ATTENTION_UNROLL
      for (int r = 0; r < 2; ++r) {
        const T sum = sum_of_group(rows_[m].sum[r]);
        const int64_t q = q_.begin + row_ + m * kFragmentRows + r * 8 + lane_group();
        if (lane_member() == 0 && q < q_.end) memory.set_state(part_, first + q, {rows_[m].maximum[r], sum});
      }
      store_rows(sums, q_.begin + row_ + m * kFragmentRows, q_.end, sums_.tile[m], factor);
    }
  }

  const ForwardProblem& p_;
  const Head& head_;
  const Range q_;
  const int part_;
  const int row_;  // of the tile, the warp's first
  const Exponential<T> exponential_;
  const Dropout dropout_;
  Sums sums_;
  RowState<T> rows_[kRowTiles];
};

template <class C>
KernelPlan plan_forward_by_shape(const AttentionProblem& p) {
  return with_shape<FirstOrderDims<C>>(p, [&](auto dim, auto mode) {
    using Whole = Forward<C, dim, mode>;
    using Split = Forward<C, dim, mode, Part::kSplit>;
    KernelPlan plan;
    if (Whole::Tiles::parts(p) == 1) {
      add_launch<Whole>(plan, Whole::blocks(p));
    } else {
      add_launch<Split>(plan, Split::blocks(p));
      add_merging<C, typename Split::Tiles>(plan, p);
    }
    return plan;
  });
}

}  // namespace
}  // namespace attention_ext
