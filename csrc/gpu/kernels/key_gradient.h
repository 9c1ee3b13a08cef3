// grad_key and grad_value: a block of threads walks the queries of all heads of a group for a tile of keys. Scores come
// transposed, rows are keys: so they are operands of both products as they are.
#pragma once

#include "gpu/kernels/backward_memory.h"
#include "gpu/kernels/gradient.h"
#include "gpu/kernels/key_walk.h"
#include "gpu/kernels/shape.h"

namespace attention_ext {
namespace {

// Where registers do not hold both gradients, each has a kernel of its own.
enum class KeyResult : uint8_t { kBoth, kKey, kValue };

template <class C, int kDim, Rules kRules, KeyResult kResult>
class KeyGradient {
  using T = typename C::Scalar;
  using E = typename C::Element;
  using Shape = BackwardShape<C, kDim>;
  static constexpr bool kOfKey = kResult != KeyResult::kValue, kOfValue = kResult != KeyResult::kKey;
  static constexpr int kKeys = Shape::kWarps * kFragmentRows, kQueryTiles = Shape::kColumns / kFragmentColumns;
  using KeyTile = SharedTile<E, kKeys, kDim>;
  using QueryTile = SharedTile<E, Shape::kRows, kDim>;
  using Scores = Fragments<T, 1, kQueryTiles>;
  using Sums = Fragments<T, 1, kDim / kFragmentColumns>;

 public:
  using Problem = BackwardProblem;
  static constexpr int kThreads = Shape::kWarps * kWarpSize;
  static constexpr size_t kSharedBytes = 2 * KeyTile::kBytes + 2 * Shape::kStages * QueryTile::kBytes;

  static int64_t blocks(const AttentionProblem& p) { return p.batch * p.kv_heads * ceil_div(p.max_seqlen_k, kKeys); }

  ATTENTION_DEVICE static void run(const BackwardProblem& p, void* workspace) {
    const int64_t group = block_index() % (p.batch * p.kv_heads), tile = block_index() / (p.batch * p.kv_heads);
    const int64_t batch = group / p.kv_heads, kv_head = group % p.kv_heads;
    const Sequence s = sequence_of(p, batch);
    const int64_t rows = p.cu_seqlens_k ? s.length_k : p.seqlen_k;
    const Range k{tile * kKeys, minimum((tile + 1) * kKeys, rows)};
    if (!k.empty()) KeyGradient(p, BackwardMemory<T>(p, workspace), k).walk(batch, kv_head);
  }

 private:
  ATTENTION_DEVICE KeyGradient(const BackwardProblem& p, const BackwardMemory<T>& memory, Range k)
      : p_(p),
        memory_(memory),
        k_(k),
        row_(thread_index() / kWarpSize * kFragmentRows),
        dropout_(dropout_by<kRules>(p)) {}

  ATTENTION_DEVICE void walk(int64_t batch, int64_t kv_head) {
    SharedArena arena{shared_memory()};
    const auto key = arena.take<KeyTile>(), value = arena.take<KeyTile>();
    key_sums_.clear();
    value_sums_.clear();
    const Head first(p_, batch, kv_head * p_.group_size());
    const Range seen = visible_keys(p_, first.sequence, {0, first.sequence.length_q});
    const Span valid({maximum(k_.begin, seen.begin), minimum(k_.end, seen.end)});
    const int row = static_cast<int>(k_.begin);
    copy_rows<kThreads>(key, key_rows<E>(first, p_.key, p_.head_dim), row, valid);
    if (kOfKey) copy_rows<kThreads>(value, key_rows<E>(first, p_.value, p_.head_dim_v), row, valid);
    for (int64_t h = 0; h < p_.group_size(); ++h) walk_head(arena, key, value, Head(p_, batch, first.head + h));
    wait_copies<0>();
    close_rows(first);
  }

  ATTENTION_DEVICE void walk_head(SharedArena arena, const KeyTile& key, const KeyTile& value, const Head& head) {
    const Rows<E> sources[] = {head_rows<E>(head, p_.query, p_.head_dim),
                               head_rows<E>(head, p_.grad_out, p_.head_dim_v)};
    const RowSource<T> rows(p_, head, memory_.delta);
    walk_rows<kThreads, Shape::kStages, QueryTile>(
        arena, sources, visible_queries(p_, head.sequence, k_), [&](int q, auto&& tile_of) {
          for (int row = 0; row < Shape::kRows; row += Shape::kColumns) {
            add_block(head, rows, key, value, q + row, tile_of(0), tile_of(1), row);
          }
        });
  }

  ATTENTION_DEVICE void add_block(const Head& head, const RowSource<T>& rows, const KeyTile& key, const KeyTile& value,
                                  int q, const QueryTile& query, const QueryTile& grad_out, int row) {
    const bool partial = is_partial(head, {q, q + Shape::kColumns}, k_);
    const ScoreBlock<T, kRules, true> block{p_, head, {q, static_cast<int>(k_.begin) + row_}, partial};
    Scores weight, grad;
    weight.clear();
    grad.clear();
    multiply_rows<C>(weight, key, row_, query, row);
    if constexpr (kOfKey) multiply_rows<C>(grad, value, row_, grad_out, row);
    differentiate(
        block, dropout_, weight, grad, [&](int n, int i) { return rows.row(block.query(0, n, i)); },
        [](int, int, T) {});
    if constexpr (kOfValue) multiply_weights<C>(value_sums_, weight, grad_out, row);
    if constexpr (kOfKey) multiply_weights<C>(key_sums_, grad, query, row);
  }

  ATTENTION_DEVICE void close_rows(const Head& head) {
    if (kOfKey && p_.grad_key) store(head, p_.grad_key, p_.head_dim, key_sums_, p_.scale);
    if (kOfValue && p_.grad_value) store(head, p_.grad_value, p_.head_dim_v, value_sums_, dropout_.kept_scale);
  }

  ATTENTION_DEVICE void store(const Head& head, const View& to, int64_t columns, const Sums& sums, double factor) {
    const T both[2] = {static_cast<T>(factor), static_cast<T>(factor)};
    store_rows(key_rows<E>(head, to, columns), k_.begin + row_, k_.end, sums.tile[0], both);
  }

  const BackwardProblem& p_;
  const BackwardMemory<T>& memory_;
  const Range k_;
  const int row_;  // of the tile, the warp's first
  const Dropout dropout_;
  Sums key_sums_, value_sums_;
};

}  // namespace
}  // namespace attention_ext
