// The query and key of each number in a lane's fragments, and the mods applied there.
#pragma once

#include "core/philox.h"
#include "core/score_mods.h"
#include "gpu/kernels/mask_numbers.h"
#include "gpu/kernels/vectors.h"

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

// Kernels are compiled for two modes: masks by position at most, or everything, dropout and block masks included.
inline ScoreMode score_mode_of(const AttentionProblem& p) {
  const bool is_plain = score_mods_of(p).folds_scale_into_exp() && p.dropout_p == 0 && !p.sparse_mask;
  return is_plain ? ScoreMode::kMask : ScoreMode::kAll;
}

// Of number i of fragment n.
template <class T, int kTiles>
ATTENTION_DEVICE ModifiedScore<NumberOps<T>> score_at(const ModifiedScore<VectorOps<T, kTiles>>& scores, int n, int i) {
  return {scores.score.number[4 * n + i], scores.softcap_grad.number[4 * n + i],
          scores.softcap_grad2.number[4 * n + i]};
}

// A launch has fewer than 2^31 blocks, and so fewer heads: 32 bits hold them, which GPUs divide fast.
ATTENTION_DEVICE int group_size_of(const AttentionProblem& p) {
  return static_cast<int>(p.heads) / static_cast<int>(p.kv_heads);
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
        kv_head(static_cast<int>(h) / group_size_of(p)),
        mods(score_mods_of(p, sequence, h)),
        diagonal(static_cast<int>(sequence.diagonal)),
        length_q(static_cast<int>(sequence.length_q)),
        length_k(static_cast<int>(sequence.length_k)) {}

  ATTENTION_DEVICE Range heads() const { return {head, head + 1}; }
  // Of a tile, the queries and keys that exist.
  ATTENTION_DEVICE Range queries_of(Range q) const { return {q.begin, minimum(static_cast<int>(q.end), length_q)}; }
  ATTENTION_DEVICE Range keys_of(Range k) const { return {k.begin, minimum(static_cast<int>(k.end), length_k)}; }
};

// A number of a call rounded to T, held in a register from here on: compilers would convert it from double anew in
// every pass of a loop, but not exchange it between lanes anew.
template <class T>
ATTENTION_DEVICE double held(double x) {
  return static_cast<double>(shuffle_xor(static_cast<T>(x), 0));
}

// A head whose mods are applied in a loop.
template <ScoreMode kMode, class T>
ATTENTION_DEVICE Head looped(Head head) {
  if constexpr (kMode == ScoreMode::kAll && sizeof(T) < sizeof(double)) {
    ScoreMods& mods = head.mods;
    mods.scale = held<T>(mods.scale);
    mods.softcap.cap = held<T>(mods.softcap.cap);
    mods.softcap.inverse = held<T>(mods.softcap.inverse);
    mods.alibi.slope = held<T>(mods.alibi.slope);
  }
  return head;
}

// The first query and key of a warp's block of scores, within the sequence; the key begins an octet.
struct Corner {
  int q, k;
};

// A block of scores, 16 kRowTiles rows by 8 kTiles columns. Rows are queries, or keys where kTransposed.
template <class T, ScoreMode kMode, bool kTransposed = false>
struct ScoreBlock {
  static constexpr bool kIsTransposed = kTransposed;
  const AttentionProblem& p;
  const Head& head;
  Corner corner;
  bool partial;         // whether a mask or the end of the keys hides some of the block
  uint32_t bits = ~0u;  // of the block mask, 4 n + i for number i of fragment n, where there are only 16 rows

  // Before any products of it, as long as registers are free.
  template <int kTiles>
  ATTENTION_DEVICE static ScoreBlock of(const AttentionProblem& p, const Head& head, Corner corner, bool partial) {
    ScoreBlock block{p, head, corner, partial};
    if (kMode == ScoreMode::kAll && partial && p.sparse_mask) block.bits = block.template visible_bits<kTiles>();
    return block;
  }

  ATTENTION_DEVICE int query(int m, int n, int i, int lane = lane_index()) const {
    return corner.q + (kTransposed ? column(n, i, lane) : row(m, i, lane));
  }
  ATTENTION_DEVICE int key(int m, int n, int i, int lane = lane_index()) const {
    return corner.k + (kTransposed ? row(m, i, lane) : column(n, i, lane));
  }

  ATTENTION_DEVICE Position<NumberOps<T>> at(int q, int k) const { return {distance(q, k), T(0)}; }

  // From a view that is broadcast like attn_mask; lanes past the end repeat the last row and column.
  ATTENTION_DEVICE T number_of(const View& view, int q, int k) const {
    const int64_t row = minimum(q, head.length_q - 1), column = minimum(k, head.length_k - 1);
    return read_mask<T>(view, offset_of(view) + row * view.stride_row + column * view.stride_col);
  }

  // The same for 16 rows at once: f(n, i, number).
  template <int kTiles, class F>
  ATTENTION_DEVICE void for_each_number_of(const View& view, F&& f, int m = 0) const {
    for_each_mask_number<T, kTiles>(view, mask_place(view, m), f);
  }

  ATTENTION_DEVICE bool changes_scores() const { return kMode == ScoreMode::kAll || partial; }

  // Dot products of 16 rows become scores, -inf where the key is hidden. With ScoreMode::kMask the scale is folded into
  // the exponential.
  template <int kTiles>
  ATTENTION_DEVICE ModifiedScore<VectorOps<T, kTiles>> scores(const Fragment<T> (&dots)[kTiles], int m = 0) const {
    using Ops = VectorOps<T, kTiles>;
    const auto dot = Ops::of([&](int n, int i) { return dots[n].number[i]; });
    ModifiedScore<Ops> modified{dot, Ops::splat(1.0), Ops::splat(0.0)};
    if (!changes_scores()) return modified;
    Position<Ops> position{Ops::splat(0.0), Ops::splat(0.0)};
    if (partial || (kMode == ScoreMode::kAll && head.mods.has_slope())) {
      const int lane = lane_of_scores();
      position.distance = Ops::of([&](int n, int i) { return distance(query(m, n, i, lane), key(m, n, i, lane)); });
    }
    if constexpr (kMode == ScoreMode::kAll) {
      if (head.mods.reads_bias()) {
        for_each_number_of<kTiles>(p.attn_mask, [&](int n, int i, T x) { position.bias.number[4 * n + i] = x; }, m);
      }
      modified = head.mods.score_mod<Ops>(dot, position);
      modified.score = head.mods.masked<Ops>(modified.score, position, partial);
    } else {
      modified.score = head.mods.masks.masked<Ops>(dot, position);
    }
    if (partial) {
      const int lane = lane_of_scores();
      const auto visible =
          Ops::Mask::of([&](int i) { return (bits >> i & 1) != 0 && key(m, i / 4, i % 4, lane) < head.length_k; });
      modified.score = Ops::select(visible, modified.score, Ops::splat(-__builtin_inf()));
    }
    return modified;
  }

  // The factor that the exponential applies to scores.
  ATTENTION_DEVICE T exp_scale() const { return kMode == ScoreMode::kAll ? T(1) : static_cast<T>(head.mods.scale); }

 private:
  // Read again beside mods, where more else is held.
  ATTENTION_DEVICE static int lane_of_scores() { return kMode == ScoreMode::kAll ? reread_lane_index() : lane_index(); }
  ATTENTION_DEVICE T distance(int q, int k) const { return static_cast<T>(k - q - head.diagonal); }

  // Rows and columns past the ends have any bits. The lane is read again, so that nothing of this is held in registers.
  template <int kTiles>
  ATTENTION_DEVICE uint32_t visible_bits() const {
    static_assert(4 * kTiles <= 32);
    const int lane = reread_lane_index(), group = lane / 4, member = lane % 4;
    const int last_q = head.length_q - 1, last_octet = (head.length_k - 1) / 8 * 8;
    uint32_t visible = 0;
    ATTENTION_UNROLL_BY(1)
    for (int n = 0; n < kTiles; ++n) {
      ATTENTION_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = i / 2 * 8, column = n * kFragmentColumns, pair = i % 2 + 2 * member;
        const int q = corner.q + (kTransposed ? column + pair : row + group);
        const int octet = corner.k + (kTransposed ? row : column);
        const uint32_t seen =
            p.sparse_mask.octet(head.sequence.batch, head.head, static_cast<BlockIndex>(maximum(0, minimum(q, last_q))),
                                static_cast<BlockIndex>(minimum(octet, last_octet)));
        visible |= (seen >> (kTransposed ? group : pair) & 1) << (4 * n + i);
      }
    }
    return visible;
  }

  ATTENTION_DEVICE int64_t offset_of(const View& view) const {
    return head.sequence.batch * view.stride_b + head.head * view.stride_h;
  }
  ATTENTION_DEVICE MaskPlace mask_place(const View& view, int m) const {
    const int first = m * kFragmentRows;
    if constexpr (kTransposed) {
      return {offset_of(view), view.stride_col, view.stride_row, corner.k + first,
              corner.q,        head.length_k,   head.length_q};
    } else {
      return {offset_of(view), view.stride_row, view.stride_col, corner.q + first,
              corner.k,        head.length_q,   head.length_k};
    }
  }

  ATTENTION_DEVICE static int row(int m, int i, int lane) { return m * kFragmentRows + i / 2 * 8 + lane / 4; }
  ATTENTION_DEVICE static int column(int n, int i, int lane) { return n * kFragmentColumns + i % 2 + 2 * (lane % 4); }
};

// Whether a mask or the end of the keys hides some of a block of scores, of any of the heads. Masks ask for distances
// alone, whose first is one number of 32 bits.
template <ScoreMode kMode>
ATTENTION_DEVICE bool is_partial(const AttentionProblem& p, const Head& head, Range heads, Range q, Range k) {
  const int first = static_cast<int>(k.begin) - static_cast<int>(q.begin) - head.diagonal;
  if (static_cast<int>(k.end) > head.length_k) return true;
  if (head.mods.masks.block_mask({0, q.size()}, {first, first + k.size()}, 0) != BlockMask::kFull) return true;
  if (kMode != ScoreMode::kAll || !p.sparse_mask) return false;
  return !p.sparse_mask.is_full(head.sequence.batch, heads, head.queries_of(q), k);
}
template <ScoreMode kMode>
ATTENTION_DEVICE bool is_partial(const AttentionProblem& p, const Head& head, Range q, Range k) {
  return is_partial<kMode>(p, head, head.heads(), q, k);
}

// Whether the block mask hides all of a block of scores.
ATTENTION_DEVICE bool is_empty(const AttentionProblem& p, const Head& head, Range q, Range k) {
  return p.sparse_mask && p.sparse_mask.block_mask(head.sequence.batch, head.head, head.queries_of(q),
                                                   head.keys_of(k)) == BlockMask::kEmpty;
}

}  // namespace
}  // namespace attention_ext
