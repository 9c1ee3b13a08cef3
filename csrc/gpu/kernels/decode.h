// The forward pass for a few queries of each sequence, as in decoding with a cache. The 16 rows of a tile are queries
// of all heads of a group, so that its keys and values are read once; the warps of a block share the keys of a tile.
#pragma once

#include "gpu/kernels/dropout.h"
#include "gpu/kernels/group_tiles.h"
#include "gpu/kernels/sources.h"

namespace attention_ext {
namespace {

// A block of threads loops over tiles of kRows keys, of which each warp has kColumns. But for float64 beyond head_dim
// 128 a block fits the smallest GPUs.
template <class C, int kDim>
struct DecodeShape : Width<C, kDim> {
  using Width<C, kDim>::kRowBytes;
  static constexpr int kWarps = kRowBytes <= 256 ? 4 : 2;
  static constexpr int kColumns = kRowBytes <= 128 ? 32 : 16;
  static constexpr int kRows = kWarps * kColumns;
  static constexpr int kStages = kRowBytes <= 512 ? 2 : 1;
};

template <class C, int kDim, ScoreMode kMode>
class Decode {
  using T = typename C::Scalar;
  using E = typename C::Element;
  using Shape = DecodeShape<C, kDim>;
  static constexpr int kKeyTiles = Shape::kColumns / kFragmentColumns;
  using QueryTile = SharedTile<E, kFragmentRows, kDim>;
  using KeyTile = SharedTile<E, Shape::kRows, kDim>;
  using KeyTiles = TileSet<KeyTile, 2>;
  using Scores = Fragments<T, 1, kKeyTiles>;
  using Block = ScoreBlock<T, kMode>;  // one for each of a lane's two rows, which may be of different heads
  using Sums = Fragments<T, 1, kDim / kFragmentColumns>;

  // Results of the warps, in the memory of the last tiles of keys: the state of each row, then its sums. Rows begin in
  // different banks.
  static constexpr int kRows = Shape::kWarps * kFragmentRows, kPitch = kDim + kFragmentColumns;
  static constexpr size_t kMergedBytes = kRows * (2 + kPitch) * sizeof(T);

 public:
  using Problem = ForwardProblem;
  static constexpr int kThreads = Shape::kWarps * kWarpSize;
  static constexpr size_t kSharedBytes = QueryTile::kBytes + maximum(Shape::kStages * KeyTiles::kBytes, kMergedBytes);
  static_assert(kSharedBytes <= (Shape::kRowBytes <= 1024 ? kFewSharedBytes : kMostSharedBytes));

  static int64_t blocks(const AttentionProblem& p) { return GroupTiles::count(p) * GroupTiles::parts(p); }

  ATTENTION_DEVICE static void run(const ForwardProblem& p, void* workspace) {
    const int64_t tiles = GroupTiles::count(p);
    GroupTile tile(p, block_index() % tiles);
    const Head head(p, tile.batch, tile.first_head);
    tile.queries.end = minimum<int64_t>(tile.queries.end, head.length_q);
    if (!tile.queries.empty()) Decode(p, head, tile, block_index() / tiles).mainloop(workspace);
  }

 private:
  ATTENTION_DEVICE Decode(const ForwardProblem& p, const Head& head, const GroupTile& tile, int64_t part)
      : p_(p),
        head_(head),
        tile_(tile),
        part_(part),
        parts_(GroupTiles::parts(p)),
        heads_{folded_head<kMode, T>(p, tile.batch, tile.head(lane_group())),
               folded_head<kMode, T>(p, tile.batch, tile.head(lane_group() + 8))},
        exponential_(exponential_of<kMode, T>(p)) {}

  ATTENTION_DEVICE void mainloop(void* workspace) {
    const QueryTile query{reinterpret_cast<E*>(shared_memory())};
    char* const memory = shared_memory() + QueryTile::kBytes;
    load(query);
    prologue();
    const Range keys = part_of_keys(visible_keys(p_, head_.sequence, tile_.queries), Shape::kRows, part_, parts_);
    const int row = warp() * Shape::kColumns;
    stream_rows<kThreads, Shape::kStages, KeyTile>(
        memory, key_sources<E>(p_, head_), keys,
        seen_keys<kMode, KeyTile::kRows>(p_, head_, tile_.heads_present(), tile_.queries),
        [&](int k, const KeyTiles& tiles, int) { add_block(query, k + row, tiles, row); });
    T* const found = reinterpret_cast<T*>(memory);
    store(found);
    synchronize_block();
    epilogue(found, workspace);
  }

  // Rows lie in several heads, of any strides.
  ATTENTION_DEVICE void load(const QueryTile& query) const {
    for (int i = thread_index(); i < kFragmentRows * kDim; i += kThreads) {
      const int row = i / kDim, d = i % kDim;
      const bool present = tile_.has(row) && d < p_.head_dim;
      const Rows<E> from =
          rows_of<E>(p_.query, head_.sequence.tensor_batch, tile_.head(row), head_.sequence.begin_q, 0);
      store_shared(query.at(row, d), present ? from.row(tile_.query(row))[d * from.stride_col] : E{});
    }
  }

  ATTENTION_DEVICE void prologue() {
    const bool has_sink = p_.sinks && part_ == 0 && warp() == 0;
    sums_.clear();
    ATTENTION_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int64_t at = head_.sequence.batch * p_.sinks_stride_b + heads_[r].head;
      rows_.maximum[r] = has_sink ? static_cast<T>(p_.sinks[at]) : -infinity<T>();
      rows_.sum[r] = has_sink && lane_member() == 0 ? T(1) : T(0);
    }
  }

  ATTENTION_DEVICE void add_block(const QueryTile& query, int k, const KeyTiles& tiles, int row) {
    const bool partial = is_partial<kMode>(p_, head_, tile_.heads_present(), tile_.queries, {k, k + Shape::kColumns});
    const Block blocks[2] = {Block::template of<kKeyTiles>(p_, heads_[0], corner(0, k), partial),
                             Block::template of<kKeyTiles>(p_, heads_[1], corner(1, k), partial)};
    Scores score;
    score.clear();
    multiply_rows<C>(score, TileRows<C, QueryTile>{query, 0}, tiles.tile[0], row);
    if (blocks[0].changes_scores()) {
      ATTENTION_UNROLL
      for (int r = 0; r < 2; ++r) {
        const auto changed = blocks[r].scores(score.tile[0]).score;
        for_each_number<kKeyTiles>([&](int n, int i) {
          if (i / 2 == r) score.tile[0][n].number[i] = changed.number[4 * n + i];
        });
      }
    }
    T rescale[2];
    const bool any = softmax_rows(score.tile[0], exponential_, rows_, rescale);
    if (any_in_warp(rescale[0] != T(1) || rescale[1] != T(1))) {
      for_each_number<Sums::kTileCount>([&](int n, int i) { sums_.tile[0][n].number[i] *= rescale[i / 2]; });
    }
    // Keys that are hidden from all these rows may hold anything.
    if (blocks[0].changes_scores() && !any_in_warp(any)) return;
    if constexpr (kMode == ScoreMode::kAll) drop(blocks, score);
    multiply_weights<C>(sums_, score, tiles.tile[1], row);
  }

  ATTENTION_DEVICE void drop(const Block (&blocks)[2], Scores& weight) const {
    const Dropout dropout = dropout_of(p_);
    if (!dropout.present) return;
    ATTENTION_UNROLL
    for (int r = 0; r < 2; ++r) {
      for_each_kept<1, kKeyTiles>(blocks[r], dropout, [&](int, int n, int i, bool kept) {
        if (i / 2 == r && !kept) weight.tile[0][n].number[i] = T(0);
      });
    }
  }

  // From which a block counts to the query of a lane's row.
  ATTENTION_DEVICE Corner corner(int r, int k) const {
    const int row = lane_group() + r * 8;
    return {static_cast<int>(tile_.query(row)) - row, k};
  }

  ATTENTION_DEVICE void store(T* found) const {
    ATTENTION_UNROLL
    for (int r = 0; r < 2; ++r) {
      const T sum = sum_of_group(rows_.sum[r]);
      const int row = warp() * kFragmentRows + lane_group() + r * 8;
      if (lane_member() == 0) {
        store_shared(found + row, rows_.maximum[r]);
        store_shared(found + kRows + row, sum);
      }
      T* const to = found + 2 * kRows + row * kPitch + 2 * lane_member();
      ATTENTION_UNROLL
      for (int n = 0; n < Sums::kTileCount; ++n) {
        ATTENTION_UNROLL
        for (int i = 0; i < 2; ++i) store_shared(to + n * kFragmentColumns + i, sums_.tile[0][n].number[2 * r + i]);
      }
    }
  }

  // A warp for each row: to `out`, or to the workspace where there are several parts.
  ATTENTION_DEVICE void epilogue(const T* found, void* workspace) const {
    for (int row = warp(); row < kFragmentRows; row += Shape::kWarps) {
      if (!tile_.has(row)) continue;
      const auto state = [&](int64_t i) {
        const T* const of_warp = found + i * kFragmentRows + row;
        return SoftmaxState<T>{load_shared(of_warp), load_shared(of_warp + kRows)};
      };
      const SoftmaxState<T> all = merged_state<T>(Shape::kWarps, state);
      const auto total = [&](int d) {
        const T* const sums = found + 2 * kRows + row * kPitch + d;
        return merged_number(Shape::kWarps, all, state,
                             [&](int64_t i) { return load_shared(sums + i * kFragmentRows * kPitch); });
      };
      const int64_t head = tile_.head(row), q = tile_.query(row);
      if (parts_ == 1) {
        finish(head, q, all, total);
      } else {
        keep(head, q, all, total, PartsWorkspace<T>(p_, workspace));
      }
    }
  }

  template <class Total>
  ATTENTION_DEVICE void finish(int64_t head, int64_t q, const SoftmaxState<T>& all, Total&& total) const {
    const Sequence& s = head_.sequence;
    E* const out = rows_of<E>(p_.out, s.tensor_batch, head, s.begin_q + q, p_.head_dim_v).data;
    const T factor = normalising(p_, all);
    for (int d = lane_index(); d < p_.head_dim_v; d += kWarpSize) {
      out[d * p_.out.stride_col] = rounded<E>(total(d) * factor);
    }
    if (lane_index() == 0) static_cast<T*>(p_.logsumexp)[row_of(p_, s, head) + q] = logsumexp_of(all);
  }

  template <class Total>
  ATTENTION_DEVICE void keep(int64_t head, int64_t q, const SoftmaxState<T>& all, Total&& total,
                             const PartsWorkspace<T>& memory) const {
    const int64_t at = row_of(p_, head_.sequence, head) + q;
    for (int d = lane_index(); d < p_.head_dim_v; d += kWarpSize) memory.sums(part_, at)[d] = total(d);
    if (lane_index() == 0) memory.set_state(part_, at, all);
  }

  ATTENTION_DEVICE static int warp() { return thread_index() / kWarpSize; }

  const ForwardProblem& p_;
  const Head& head_;
  const GroupTile& tile_;
  const int64_t part_, parts_;
  const Head heads_[2];  // of the lane's rows
  const Exponential<T> exponential_;
  Sums sums_;
  RowState<T> rows_;
};

template <class C>
KernelPlan plan_decode_by_shape(const AttentionProblem& p) {
  return with_shape(p, [&](auto dim, auto mode) {
    using Kernel = Decode<C, dim, mode>;
    KernelPlan plan;
    add_launch<Kernel>(plan, Kernel::blocks(p));
    if (GroupTiles::parts(p) > 1) add_merging<C, GroupTiles>(plan, p);
    return plan;
  });
}

}  // namespace
}  // namespace attention_ext
