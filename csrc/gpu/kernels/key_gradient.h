// grad_key and grad_value: a block of threads loops over the queries of all heads of a group for a tile of keys. Scores
// come transposed, rows are keys: so they are operands of both products as they are.
#pragma once

#include "gpu/kernels/gradient.h"

namespace attention_ext {
namespace {

// Where registers do not hold both gradients, each has a kernel of its own.
enum class KeyResult : uint8_t { kBoth, kKey, kValue };

template <class C, int kDim, ScoreMode kMode, Order kOrder, KeyResult kResult>
class KeyGradient {
  using T = typename C::Scalar;
  using E = typename C::Element;
  using Shape = GradientShape<C, kDim, kOrder, kMode, true>;
  static constexpr bool kOfKey = kResult != KeyResult::kValue, kOfValue = kResult != KeyResult::kKey;
  static constexpr int kKeys = Shape::kWarps * kFragmentRows, kColumns = Shape::kKeyColumns,
                       kTiles = kColumns / kFragmentColumns;
  using KeyTile = SharedTile<E, kKeys, kDim>;
  using KeyTiles = TileSet<KeyTile, kKeySources<kOrder>>;
  using QueryTile = StreamedTile<C, Shape, kDim>;
  using QueryTiles = TileSet<QueryTile, kQuerySources<kOrder>>;
  using OwnKeys = OwnRows<C, KeyTile, kKeySources<kOrder>, Shape::kHoldsOwn>;
  using QueryNumbers = StreamedNumbers<T, kOrder, Shape::kRows, Shape::kStages>;
  using Sums = Fragments<T, 1, kDim / kFragmentColumns>;

 public:
  using Problem = ProblemOf<kOrder>;
  static constexpr int kThreads = Shape::kWarps * kWarpSize;
  static constexpr size_t kQueryBytes = kStreamBytes<QueryTile, kQuerySources<kOrder>, Shape::kStages>;
  static constexpr size_t kSharedBytes =
      maximum(KeyTiles::kBytes, OwnKeys::kBytes + kQueryBytes + QueryNumbers::kBytes);
  static_assert(Shape::kRows <= kThreads);
  static_assert(kSharedBytes <= Shape::kSharedBytesAllowed);

  static int64_t blocks(const AttentionProblem& p) { return KeyTileIndex::count(p, kKeys); }

  ATTENTION_DEVICE static void run(const Problem& p, void* workspace) {
    const KeyTileIndex at(p, kKeys);
    const int64_t rows = p.cu_seqlens_k ? sequence_of(p, at.batch).length_k : p.seqlen_k;
    const Range k{at.tile * kKeys, minimum((at.tile + 1) * kKeys, rows)};
    if (!k.empty())
      KeyGradient(p, BackwardMemory<T>(p, workspace), k)
          .mainloop(static_cast<int>(at.batch), static_cast<int>(at.kv_head));
  }

 private:
  ATTENTION_DEVICE KeyGradient(const Problem& p, const BackwardMemory<T>& memory, Range k)
      : p_(p),
        memory_(memory),
        k_(k),
        row_(thread_index() / kWarpSize * kFragmentRows),
        dropout_(dropout_by<kMode, T>(p)) {}

  ATTENTION_DEVICE void mainloop(int batch, int kv_head) {
    key_sums_.clear();
    value_sums_.clear();
    const KeyTiles keys(shared_memory());
    char* const memory = shared_memory() + OwnKeys::kBytes;
    const Head first = head_of(batch, kv_head);
    const Range seen = visible_keys(p_, first.sequence, {0, first.sequence.length_q});
    const Span valid({maximum<int64_t>(k_.begin, seen.begin), minimum<int64_t>(k_.end, seen.end)});
    copy_set<kThreads>(keys, key_sources<E>(p_, first), k_.begin, valid);
    OwnKeys own(keys, row_);
    own.load();
    for (int h = 0; h < group_size_of(p_); ++h) {
      const Head head = looped<kMode, T>(head_of(batch, kv_head, h));
      QueryNumbers numbers({p_, head, memory_}, memory + kQueryBytes);
      const int tile_rows = k_.begin + row_ < k_.end ? Shape::kRows : 0;  // a warp without keys only helps to copy
      const auto add_tiles = [&](int q, const QueryTiles& queries, int stage) {
        const bool partial = is_partial<kMode>(p_, head, {q, q + Shape::kRows}, k_.range());
        for (int row = 0; row < tile_rows; row += kColumns) {
          const auto block =
              ScoreBlock<T, kMode, true>::template of<kTiles>(p_, head, {q + row, k_.begin + row_}, partial);
          add_block(block, own, queries, row, [&](int, int n, int i) { return numbers.at(stage, row, n, i); });
        }
      };
      stream_rows<kThreads, Shape::kStages, QueryTile>(
          memory, query_sources<E>(p_, head), visible_queries(p_, head.sequence, k_.range()),
          seen_queries<kMode, QueryTile::kRows>(p_, head, k_.range()), add_tiles, numbers);
    }
    epilogue(Shape::kFirst ? head_of(batch, kv_head) : first);  // made anew, it holds no registers in the loop
  }

  template <class RowOf>
  ATTENTION_DEVICE void add_block(const ScoreBlock<T, kMode, true>& block, const OwnKeys& keys,
                                  const QueryTiles& queries, int row, RowOf&& rows) {
    GradientBlock<C, kMode, kOrder, true, kTiles> products;
    products.multiply(p_, keys, queries, row);
    products.differentiate(p_, block, dropout_, rows, [](const auto&) {});
    if constexpr (kOfValue) multiply_weights<C>(value_sums_, products.weight, queries.tile[1], row);
    if constexpr (kOfKey) products.add_gradient(p_, key_sums_, queries, row);
  }

  ATTENTION_DEVICE Head head_of(int batch, int kv_head, int of_group = 0) const {
    return {p_, batch, kv_head * group_size_of(p_) + of_group};
  }

  ATTENTION_DEVICE void epilogue(const Head& head) {
    if (kOfKey && p_.grad_key) store(head, p_.grad_key, p_.head_dim, key_sums_, p_.scale);
    if (kOfValue && p_.grad_value) store(head, p_.grad_value, p_.head_dim_v, value_sums_, dropout_.kept_scale);
  }

  ATTENTION_DEVICE void store(const Head& head, const View& to, int64_t columns, const Sums& sums, double factor) {
    const T both[2] = {static_cast<T>(factor), static_cast<T>(factor)};
    store_rows(key_rows<E>(head, to, columns), k_.begin + row_, k_.end, sums.tile[0], both);
  }

  const Problem& p_;
  const BackwardMemory<T>& memory_;
  const Span k_;
  const int row_;  // of the tile, the warp's first
  const Dropout dropout_;
  Sums key_sums_, value_sums_;
};

}  // namespace
}  // namespace attention_ext
