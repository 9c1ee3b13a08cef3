// How a double backward call is cut into jobs, and the memory they work in.
#pragma once

#include "cpu/kernels/backward_memory.h"
#include "cpu/kernels/gradient_tangent.h"
#include "cpu/kernels/jvp.h"

namespace attention_ext {
namespace {

// Bound on a job's scratch, so that a thread's memory does not grow with the length. A tile holds matrices of its
// blocks in the rest of it: beyond L2, but reading them is still cheaper than the products that make them.
constexpr int64_t kMostScratchBytes = 4 << 20;

ATTENTION_INLINE GradientJobs double_backward_jobs(const BackwardProblem& p) {
  return {p, p.max_seqlen_q, p.grad_attn_mask.stride_row};
}

template <class C>
struct DoubleBackwardShared {
  using T = typename C::Scalar;
  T *delta, *delta_tangent;
  SlopeSums slope_sums;
  GroupSums<T> key_sums, value_sums;  // grad_key / scale, grad_value / kept_scale

  DoubleBackwardShared(Arena& arena, const BackwardProblem& p, const BackwardShape<C>& shape, int64_t groups)
      : delta(take_rows<T>(arena, p)),
        delta_tangent(take_rows<T>(arena, p)),
        slope_sums(arena, p, groups),
        key_sums(arena, p, p.grad_key ? groups : 0, p.kv_heads, p.seqlen_k, shape.columns),
        value_sums(arena, p, p.grad_value ? groups : 0, p.kv_heads, p.seqlen_k, shape.value_columns) {}

  // The sums of a group for one key head.
  void clear(const BackwardProblem& p, int64_t group, const Sequence& s, int64_t kv_head) const {
    const int64_t length = key_rows_of(p, s);
    if (p.grad_key) key_sums.clear(group, s, kv_head, s.begin_k, length);
    if (p.grad_value) value_sums.clear(group, s, kv_head, s.begin_k, length);
    if (!p.grad_alibi_slopes) return;
    for (int64_t g = 0; g < p.group_size(); ++g) slope_sums.of(group, s, kv_head * p.group_size() + g) = 0.0;
  }
};

// All but the matrices that a tile holds.
template <class C>
struct DoubleBackwardTileScratch : JvpScratch<C> {
  using T = typename C::Scalar;
  using Element = typename C::Element;
  Element *key_lanes, *key_tangent_lanes, *query_lanes, *query_tangent_rows, *query_tangent_lanes;
  Matrix<T> weight_tangent, grad_query;  // dropout(P') of a block, and of the tile
  Gradients<T> grad_score;
  SoftcapGrads<T> softcap_grads;
  GradientRows<T> rows;
  BothWaysMemory<C> grad_out;

  DoubleBackwardTileScratch(Arena& arena, const DoubleBackwardProblem& p, const RunShape<C>& run,
                            const BackwardShape<C>& shape)
      : JvpScratch<C>(arena, p, run), grad_out(arena, p.head_dim_v) {
    const int64_t padded_keys = shape.keys + kTileRows;
    const int64_t query = kQueries<T> * round_up(shape.depth, kLanes<Element>);
    const int64_t lanes = C::kPair == 1 ? 0 : padded_keys * shape.columns;
    key_lanes = arena.take<Element>(lanes);
    key_tangent_lanes = arena.take<Element>(p.tangent.key ? lanes : 0);
    query_lanes = arena.take<Element>(C::kPair == 1 ? 0 : query);
    query_tangent_rows = arena.take<Element>(p.tangent.query ? query : 0);
    query_tangent_lanes = arena.take<Element>(p.tangent.query && C::kPair != 1 ? query : 0);
    const auto block_of = [&](int64_t keys) { return Matrix<T>{arena.take<T>(keys * kQueries<T>), kQueries<T>}; };
    weight_tangent = block_of(padded_keys);
    grad_score = {block_of(padded_keys), block_of(padded_keys)};
    if (score_mods_of(p).is_nonlinear()) softcap_grads = {block_of(padded_keys), block_of(padded_keys)};
    grad_query = {arena.take<T>(kQueries<T> * shape.columns), shape.columns};
    rows.mean = arena.take<T>(kQueries<T>);
    rows.delta = arena.take<T>(kQueries<T>);
    rows.delta_tangent = arena.take<T>(kQueries<T>);
    rows.centred = arena.take<T>(kQueries<T>);
  }
};

// The matrices that a tile holds of its blocks between its two parts. Where out' is made it gives D', and P and P S'
// are held. Where it is not asked for, dP and dP' may give D' instead, if all four can be held: to make them twice
// would cost more than out'.
template <class T>
struct HeldBlocks {
  bool makes_out;
  int64_t keys;
  Scores<T> scores;
  Gradients<T> gradients;
};

template <class C>
struct DoubleBackwardScratch : DoubleBackwardTileScratch<C> {
  using T = typename C::Scalar;

  DoubleBackwardScratch(Arena& arena, const DoubleBackwardProblem& p, const RunShape<C>& run,
                        const BackwardShape<C>& shape)
      : DoubleBackwardTileScratch<C>(arena, p, run, shape), longest_(round_up(p.max_seqlen_k, kKeys)) {
    const int64_t left = kMostScratchBytes - bytes_of_whole_blocks(p, run, shape);
    most_keys_of_two_ = most_held_keys(left, 2);
    most_keys_of_four_ = p.out_tangent ? -1 : most_held_keys(left, 4);
    const int64_t some_make_out = p.max_seqlen_k > most_keys_of_four_ ? 2 * rows_of(most_keys_of_two_) : 0;
    held_ = arena.take<T>(maximum(some_make_out, 4 * rows_of(most_keys_of_four_)) * kQueries<T>);
  }

  // For a sequence of so many keys; which of the two it is depends on nothing else of the call.
  HeldBlocks<T> held(int64_t length) const {
    const bool makes_out = length > most_keys_of_four_;
    const int64_t most = makes_out ? most_keys_of_two_ : most_keys_of_four_, rows = rows_of(most);
    const auto matrix = [&](int64_t i) { return Matrix<T>{held_ + i * rows * kQueries<T>, kQueries<T>}; };
    HeldBlocks<T> held{makes_out, minimum(most, longest_), {matrix(0), matrix(1)}, {}};
    if (!makes_out) held.gradients = {matrix(2), matrix(3)};
    return held;
  }

 private:
  // Of everything else, however few keys the call has.
  static int64_t bytes_of_whole_blocks(const DoubleBackwardProblem& p, RunShape<C> run, BackwardShape<C> shape) {
    run.keys = shape.keys = kKeys;
    Arena measure(nullptr);
    DoubleBackwardTileScratch<C>(measure, p, run, shape);
    return static_cast<int64_t>(measure.used());
  }

  // Of a matrix, its spare rows included.
  int64_t rows_of(int64_t most_keys) const { return most_keys < 0 ? 0 : minimum(most_keys, longest_) + kTileRows; }

  // Whole blocks of which so many matrices, with their spare rows, fit.
  static int64_t most_held_keys(int64_t bytes, int64_t matrices) {
    const int64_t rows = bytes / (matrices * kQueries<T> * static_cast<int64_t>(sizeof(T)));
    return maximum<int64_t>(rows - kTileRows - 1, 0) / kKeys * kKeys;
  }

  int64_t longest_, most_keys_of_two_, most_keys_of_four_;  // none of four where out' is asked for
  T* held_;
};

}  // namespace
}  // namespace attention_ext
