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
    const int64_t length = p.cu_seqlens_k ? s.length_k : p.seqlen_k;
    if (p.grad_key) key_sums.clear(group, s, kv_head, s.begin_k, length);
    if (p.grad_value) value_sums.clear(group, s, kv_head, s.begin_k, length);
    if (!p.grad_alibi_slopes) return;
    for (int64_t g = 0; g < p.group_size(); ++g) slope_sums.of(group, s, kv_head * p.group_size() + g) = 0.0;
  }
};

template <class C>
struct DoubleBackwardScratch : JvpScratch<C> {
  using T = typename C::Scalar;
  using Element = typename C::Element;
  Element *key_lanes, *key_tangent_lanes, *query_lanes, *query_tangent_rows, *query_tangent_lanes;
  Matrix<T> weight_tangent, grad_query;  // dropout(P') of a block, and of the tile
  Gradients<T> grad_score;
  SoftcapGrads<T> softcap_grads;
  GradientRows<T> rows;
  BothWaysMemory<C> grad_out;

  // Where out' is made it gives D', and P and P S' are held. Where it is not asked for, dP and dP' may give D' instead,
  // if all four can be held: to make them twice would cost more than out'.
  bool makes_out;
  int64_t held_keys;
  Scores<T> held_scores;
  Gradients<T> held_gradients;

  DoubleBackwardScratch(Arena& arena, const DoubleBackwardProblem& p, const RunShape<C>& run,
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

    const int64_t left = kMostScratchBytes - static_cast<int64_t>(arena.used());
    makes_out = p.out_tangent || p.max_seqlen_k > most_held_keys(left, 4);
    held_keys = minimum(most_held_keys(left, makes_out ? 2 : 4), round_up(p.max_seqlen_k, kKeys));
    held_scores = {block_of(held_keys + kTileRows), block_of(held_keys + kTileRows)};
    if (!makes_out) held_gradients = {block_of(held_keys + kTileRows), block_of(held_keys + kTileRows)};
  }

 private:
  // Whole blocks of which so many matrices, with their spare rows, fit.
  static int64_t most_held_keys(int64_t bytes, int64_t matrices) {
    const int64_t rows = bytes / (matrices * kQueries<T> * static_cast<int64_t>(sizeof(T)));
    return maximum<int64_t>(rows - kTileRows - 1, 0) / kKeys * kKeys;
  }
};

}  // namespace
}  // namespace attention_ext
