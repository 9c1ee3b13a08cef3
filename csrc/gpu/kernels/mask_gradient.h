// grad_attn_mask: a block of threads owns a tile of it and loops over everything that was broadcast along the mask, so
// that each number is summed in one place and stored once.
#pragma once

#include "gpu/kernels/gradient.h"
#include "gpu/kernels/mask_tiles.h"

namespace attention_ext {
namespace {

template <class C, int kDim, Order kOrder>
class MaskGradient {
  using T = typename C::Scalar;
  using E = typename C::Element;
  using Shape = GradientShape<C, kDim, kOrder>;
  static constexpr ScoreMode kMode = ScoreMode::kAll;
  static constexpr int kQueries = Shape::kWarps * kFragmentRows, kKeys = Shape::kColumns;
  static constexpr int kTiles = kKeys / kFragmentColumns;
  using QueryTile = SharedTile<E, kQueries, kDim>;
  using QueryTiles = TileSet<QueryTile, kQuerySources<kOrder>>;
  using KeyTiles = TileSet<SharedTile<E, kKeys, kDim>, kKeySources<kOrder>>;

 public:
  using Problem = ProblemOf<kOrder>;
  static constexpr int kThreads = Shape::kWarps * kWarpSize;
  static constexpr size_t kSharedBytes =
      maximum(QueryTiles::kBytes + KeyTiles::kBytes, (kKeys + 1) * kQueries * sizeof(T));
  static_assert(kSharedBytes <= Shape::kSharedBytesAllowed);

  static int64_t blocks(const BackwardProblem& p) { return MaskTiles(p, kQueries, kKeys).blocks(); }

  ATTENTION_DEVICE static void run(const Problem& p, void* workspace) {
    MaskGradient(p, BackwardMemory<T>(p, workspace)).mainloop(MaskTiles(p, kQueries, kKeys).part(block_index()));
  }

 private:
  ATTENTION_DEVICE MaskGradient(const Problem& p, const BackwardMemory<T>& memory)
      : p_(p), memory_(memory), row_(thread_index() / kWarpSize * kFragmentRows), dropout_(dropout_by<kMode, T>(p)) {}

  ATTENTION_DEVICE void mainloop(const MaskPart& part) {
    sums_.clear();
    for (int64_t b = part.batches.begin; b < part.batches.end; ++b) {
      for (int64_t h = part.heads.begin; h < part.heads.end; ++h) {
        const Head head = looped<kMode, T>(Head(p_, b, h));
        for (int64_t i = part.query_tiles.begin; i < part.query_tiles.end; ++i) {
          const Range q{i * kQueries, minimum((i + 1) * kQueries, head.sequence.length_q)};
          for (int64_t j = part.key_tiles.begin; j < part.key_tiles.end; ++j) {
            add_block(head, q, {j * kKeys, (j + 1) * kKeys});
          }
        }
      }
    }
    store(part.batches.begin, part.heads.begin, part.query_tiles.begin * kQueries, part.key_tiles.begin * kKeys);
  }

  ATTENTION_DEVICE void add_block(const Head& head, Range q, Range k) {
    if (q.empty()) return;
    const Range seen = visible_keys(p_, head.sequence, q);
    const Range valid{maximum(k.begin, seen.begin), minimum(k.end, seen.end)};
    if (valid.empty() || is_empty(p_, head, q, valid)) return;
    const QueryTiles queries(shared_memory());
    const KeyTiles keys(shared_memory() + QueryTiles::kBytes);
    const int first_q = static_cast<int>(q.begin), first_k = static_cast<int>(k.begin);
    copy_set<kThreads>(queries, query_sources<E>(p_, head), first_q, Span(q));
    copy_set<kThreads>(keys, key_sources<E>(p_, head), first_k, Span(valid));
    commit_copies();
    wait_copies<0>();
    synchronize_block();
    const auto block = ScoreBlock<T, kMode>::template of<kTiles>(p_, head, {first_q + row_, first_k},
                                                                 is_partial<kMode>(p_, head, q, k));
    const RowSource<T, kOrder> rows(p_, head, memory_);
    GradientBlock<C, kMode, kOrder, false, kTiles> products;
    products.multiply(p_, OwnRows<C, QueryTile, kQuerySources<kOrder>, false>(queries, row_), keys, 0);
    products.differentiate(
        p_, block, dropout_, [&](int, int n, int i) { return rows.row(block.query(0, n, i)); },
        [&](const auto& gradients) {
          for_each_number<kTiles>([&](int n, int i) { sums_.tile[0][n].number[i] += gradients.tile[0][n].number[i]; });
        });
    synchronize_block();
  }

  // Through shared memory, where sums over the tile's rows and columns are made in order.
  ATTENTION_DEVICE void store(int64_t b, int64_t h, int64_t first_q, int64_t first_k) {
    constexpr int kStride = kKeys + 1;
    auto* tile = reinterpret_cast<T*>(shared_memory());
    for_each_number<kTiles>([&](int n, int i) {
      const int row = row_ + i / 2 * 8 + lane_group(), column = n * kFragmentColumns + 2 * lane_member() + i % 2;
      store_shared(tile + row * kStride + column, sums_.tile[0][n].number[i]);
    });
    synchronize_block();
    const View& to = p_.grad_attn_mask;
    const int rows = to.stride_row == 0 ? kQueries : 1, columns = to.stride_col == 0 ? kKeys : 1;
    T* data = static_cast<T*>(to.data) + b * to.stride_b + h * to.stride_h;
    for (int i = thread_index(); i < kQueries / rows * (kKeys / columns); i += kThreads) {
      const int row = i / (kKeys / columns), column = i % (kKeys / columns);
      const int64_t q = first_q + row, k = first_k + column;
      if (q >= p_.max_seqlen_q || k >= p_.max_seqlen_k) continue;
      T sum = 0;
      for (int m = 0; m < rows; ++m) {
        for (int n = 0; n < columns; ++n) sum += load_shared(tile + (row + m) * kStride + column + n);
      }
      data[q * to.stride_row + k * to.stride_col] = sum;
    }
  }

  const Problem& p_;
  const BackwardMemory<T>& memory_;
  const int row_;  // of the tile, the warp's first
  const Dropout dropout_;
  Fragments<T, 1, kTiles> sums_;
};

}  // namespace
}  // namespace attention_ext
