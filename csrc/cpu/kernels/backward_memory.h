// How a backward call is cut into jobs, and the memory they work in.
#pragma once

#include "cpu/kernels/tile.h"

namespace attention_ext {
namespace {

// The key blocks of a sequence are dealt to a few groups, each with sums of its own for grad_query, so that few heads
// make enough jobs. How many depends on the length alone, or the last bits would depend on what else is in the batch.
constexpr int64_t kBlocksPerGroup = 5;
constexpr int64_t kMostGroups = 4;

ATTENTION_INLINE int64_t groups_of(int64_t keys) {
  return clamp(ceil_div(keys, kKeys) / kBlocksPerGroup, 1, kMostGroups);
}

template <class C>
struct BackwardShape {
  using T = typename C::Scalar;
  int64_t depth, value_depth;      // elements
  int64_t columns, value_columns;  // numbers, whole vectors
  int64_t keys;                    // rows of a block
  int64_t groups;                  // of key blocks, dealt in turn so that causal work is even; of the longest sequence
  int64_t batches, kv_heads;       // that have jobs of their own
  int64_t batch_step, kv_head_step;
  int64_t jobs;

  explicit BackwardShape(const BackwardProblem& p) {
    depth = ceil_div(p.head_dim, C::kPair);
    value_depth = ceil_div(p.head_dim_v, C::kPair);
    columns = round_up(p.head_dim, kLanes<T>);
    value_columns = round_up(p.head_dim_v, kLanes<T>);
    keys = minimum(kKeys, round_up(p.max_seqlen_k, kTileRows));
    // Jobs that would add to the same numbers of the mask's gradient are one job.
    const View& mask = p.grad_attn_mask;
    batch_step = mask && mask.stride_b == 0 ? p.batch : 1;
    kv_head_step = mask && mask.stride_h == 0 ? p.kv_heads : 1;
    batches = p.batch / maximum<int64_t>(batch_step, 1);
    kv_heads = p.kv_heads / maximum<int64_t>(kv_head_step, 1);
    groups = mask && mask.stride_col == 0 ? 1 : groups_of(p.max_seqlen_k);
    jobs = batches * kv_heads * groups;
  }

  Range batches_of(int64_t job) const {
    const int64_t first = job / groups / kv_heads * batch_step;
    return {first, first + batch_step};
  }
  Range kv_heads_of(int64_t job) const {
    const int64_t first = job / groups % kv_heads * kv_head_step;
    return {first, first + kv_head_step};
  }
};

template <class C>
struct BackwardShared {
  using T = typename C::Scalar;
  T* delta;            // (b, h, q)
  T* sums;             // grad_query / scale: (group, b, h, q, columns), a spare row after each sequence
  double* slope_sums;  // (group, batch, head)

  BackwardShared(Arena& arena, const BackwardProblem& p, const BackwardShape<C>& shape) {
    delta = arena.take<T>(tensor_batches(p) * p.heads * p.seqlen_q);
    slope_sums = arena.take<double>(shape.groups * p.batch * p.heads);
    sums =
        arena.take<T>(p.grad_query ? shape.groups * tensor_batches(p) * p.heads * rows_per_head(p) * shape.columns : 0);
  }

  Matrix<T> query_sums(const BackwardProblem& p, const BackwardShape<C>& shape, int64_t group, const Sequence& s,
                       int64_t head) const {
    const int64_t spare = p.cu_seqlens_q ? s.batch : 0;
    const int64_t head_index = (group * tensor_batches(p) + s.tensor_batch) * p.heads + head;
    return {sums + (head_index * rows_per_head(p) + s.begin_q + spare) * shape.columns, shape.columns};
  }

 private:
  static int64_t tensor_batches(const BackwardProblem& p) { return p.cu_seqlens_q ? 1 : p.batch; }
  static int64_t rows_per_head(const BackwardProblem& p) { return p.seqlen_q + (p.cu_seqlens_q ? p.batch : 1); }
};

// A tile of queries (or of grad_out) as each product reads it.
template <class C>
struct BothWays {
  Matrix<const typename C::Element> columns;  // (depth, q)
  Matrix<const typename C::Element> lanes;    // (q, columns)
};

template <class C>
struct BothWaysMemory {
  typename C::Element *rows, *columns, *lanes;

  BothWaysMemory(Arena& arena, int64_t width) {
    using Element = typename C::Element;
    const int64_t depth = round_up(ceil_div(width, C::kPair), kLanes<Element>);
    rows = arena.take<Element>(kQueries<typename C::Scalar> * depth);
    columns = arena.take<Element>(depth * kQueries<typename C::Scalar>);
    lanes = arena.take<Element>(C::kPair == 1 ? 0 : kQueries<typename C::Scalar> * depth);
  }
};

template <class C>
BothWays<C> both_ways(Source from, const Tile& tile, int64_t width, const BothWaysMemory<C>& memory) {
  using T = typename C::Scalar;
  const int64_t queries = tile.vectors * kLanes<T>;
  const auto rows = rows_of<C>(from, tile.q.size(), queries, width, memory.rows);
  const Matrix<typename C::Element> columns{memory.columns, kQueries<T>};
  transpose_rows<C>(rows, tile.vectors, ceil_div(width, C::kPair), columns);
  return {as_operand(columns), lanes_of<C>(rows, queries, round_up(width, kLanes<T>), memory.lanes)};
}

template <class C>
struct BackwardScratch {
  using T = typename C::Scalar;
  using Element = typename C::Element;
  Element *key_rows, *key_lanes, *value_rows, *weight_rows;
  T *weight, *grad_score, *slope, *bias, *grad_key, *grad_value, *logsumexp, *delta, *factor;
  BothWaysMemory<C> query, grad_out;

  BackwardScratch(Arena& arena, const BackwardProblem& p, const BackwardShape<C>& shape)
      : query(arena, p.head_dim), grad_out(arena, p.head_dim_v) {
    const int64_t padded_keys = shape.keys + kTileRows, block = padded_keys * kQueries<T>;
    const bool paired = C::kPair != 1;
    key_rows = arena.take<Element>(padded_keys * round_up(shape.depth, kLanes<Element>));
    key_lanes = arena.take<Element>(paired ? padded_keys * shape.columns : 0);
    value_rows = arena.take<Element>(padded_keys * round_up(shape.value_depth, kLanes<Element>));
    weight_rows = arena.take<Element>(paired ? block : 0);
    weight = arena.take<T>(block);
    grad_score = arena.take<T>(block);
    slope = arena.take<T>(p.softcap > 0 ? block : 0);
    bias = arena.take<T>(p.attn_mask ? block : 0);
    grad_key = arena.take<T>((shape.keys + 1) * shape.columns);
    grad_value = arena.take<T>((shape.keys + 1) * shape.value_columns);
    logsumexp = arena.take<T>(kQueries<T>);
    delta = arena.take<T>(kQueries<T>);
    factor = arena.take<T>(kKeys);
  }
};

}  // namespace
}  // namespace attention_ext
