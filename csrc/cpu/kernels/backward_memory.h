// How a backward call is cut into jobs, and the memory they work in.
#pragma once

#include "cpu/kernels/probability.h"
#include "cpu/kernels/query_operand.h"
#include "cpu/kernels/score_mod.h"

namespace attention_ext {
namespace {

// The key blocks of a sequence (in double backward its query tiles) are dealt to a few groups, each with its own copy
// of the sums that all of them add to, so that few heads make enough jobs. Their number depends on the length alone, or
// the last bits would depend on the rest of the batch.
constexpr int64_t kBlocksPerGroup = 5;
constexpr int64_t kMostGroups = 4;

ATTENTION_INLINE int64_t groups_of(int64_t length) {
  return clamp(ceil_div(length, kKeys) / kBlocksPerGroup, 1, kMostGroups);
}

// Rows of keys that a sequence owns, those beyond its key length included.
ATTENTION_INLINE int64_t key_rows_of(const AttentionProblem& p, const Sequence& s) {
  return p.cu_seqlens_k ? s.length_k : p.seqlen_k;
}

// (batches, key heads, groups). Jobs that would add to the same numbers of the mask's gradient are one job.
struct GradientJobs {
  int64_t groups;  // of the longest sequence
  int64_t batch_step, kv_head_step;
  int64_t batches, kv_heads, count;

  // stride: of the mask's gradient along the dimension that is dealt
  GradientJobs(const BackwardProblem& p, int64_t longest, int64_t stride) {
    const View& mask = p.grad_attn_mask;
    batch_step = mask && mask.stride_b == 0 ? p.batch : 1;
    kv_head_step = mask && mask.stride_h == 0 ? p.kv_heads : 1;
    batches = p.batch / maximum<int64_t>(batch_step, 1);
    kv_heads = p.kv_heads / maximum<int64_t>(kv_head_step, 1);
    groups = mask && stride == 0 ? 1 : groups_of(longest);
    count = batches * kv_heads * groups;
  }

  // Of one sequence; the others of the call leave nothing for it.
  int64_t groups_for(int64_t length) const { return minimum(groups_of(length), groups); }

  int64_t group_of(int64_t job) const { return job % groups; }
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
struct BackwardShape {
  using T = typename C::Scalar;
  int64_t depth, value_depth;      // elements
  int64_t columns, value_columns;  // numbers, whole vectors
  int64_t keys;                    // rows of a block
  bool adds_queries;               // grad_query is a sum over blocks; else one block holds all keys and finishes it

  explicit BackwardShape(const BackwardProblem& p) {
    depth = ceil_div(p.head_dim, C::kPair);
    value_depth = ceil_div(p.head_dim_v, C::kPair);
    columns = round_up(p.head_dim, kLanes<T>);
    value_columns = round_up(p.head_dim_v, kLanes<T>);
    keys = minimum(kKeys, round_up(p.max_seqlen_k, kTileRows));
    adds_queries = p.grad_query && p.max_seqlen_k > kKeys;
  }
};

// Numbers per query (b, h, q). delta comes first in the shared memory of every pass that has one.
template <class T>
T* take_rows(Arena& arena, const AttentionProblem& p) {
  return arena.take<T>((p.cu_seqlens_q ? 1 : p.batch) * p.heads * p.seqlen_q);
}

// Sums of some rows of a sequence.
template <class T>
struct RowSums {
  Range rows;
  Matrix<T> data;
};

// All that `count` sums hold of each row, added in their order, times factor, into the rows of a tensor.
template <class T>
void write_sums(const Source& to, int64_t length, int64_t width, const RowSums<T>* sums, int64_t count, double factor) {
  const auto one_factor = static_cast<T>(factor);
  for (Range part; part.begin < length; part.begin = part.end) {
    part.end = length;  // or where the first of the sums begins or ends
    for (int64_t i = 0; i < count; ++i) {
      for (const int64_t edge : {sums[i].rows.begin, sums[i].rows.end}) {
        if (edge > part.begin) part.end = minimum(part.end, edge);
      }
    }
    Matrix<T> total{};
    for (int64_t i = 0; i < count; ++i) {
      if (part.begin < sums[i].rows.begin || part.end > sums[i].rows.end) continue;
      const Matrix<T> more = rows_from(sums[i].data, part.begin - sums[i].rows.begin);
      if (total.data) {
        for (int64_t j = 0; j < part.size() * total.stride; j += kLanes<T>) {
          store(total.data + j, load(total.data + j) + load(more.data + j));
        }
      } else {
        total = more;
      }
    }
    if (total.data) {
      write_rows(rows_from(to, part.begin), part.size(), width, as_operand(total), &one_factor, 0);
    } else {
      clear_rows<T>(rows_from(to, part.begin), part.size(), width);
    }
  }
}

// Sums that groups keep apart until all are done: (group, b, h, row, columns), with a spare row after each sequence.
template <class T>
struct GroupSums {
  T* data;
  int64_t groups, batches, heads, rows, columns;
  bool packed;

  GroupSums(Arena& arena, const AttentionProblem& p, int64_t group_count, int64_t head_count, int64_t length,
            int64_t width)
      : groups(group_count), heads(head_count), columns(width), packed(p.cu_seqlens_q != nullptr) {
    batches = packed ? 1 : p.batch;
    rows = length + (packed ? p.batch : 1);
    data = arena.take<T>(groups * batches * heads * rows * columns);
  }

  // begin: the first row of the sequence
  Matrix<T> of(int64_t group, const Sequence& s, int64_t head, int64_t begin) const {
    const int64_t index = (group * batches + s.tensor_batch) * heads + head;
    return {data + (index * rows + begin + (packed ? s.batch : 0)) * columns, columns};
  }

  void clear(int64_t group, const Sequence& s, int64_t head, int64_t begin, int64_t length) const {
    clear_lanes(of(group, s, head, begin).data, (length + 1) * columns);
  }

  // The sums of the first `count` groups, in their order, times factor, into the rows of a tensor.
  void write(const View& to, int64_t width, const Sequence& s, int64_t head, int64_t begin, int64_t length,
             int64_t count, double factor) const {
    RowSums<T> sums[kMostGroups];
    for (int64_t group = 0; group < count; ++group) sums[group] = {{0, length}, of(group, s, head, begin)};
    write_sums(source_of(to, s.tensor_batch, head, begin), length, width, sums, count, factor);
  }
};

// One number per group and head: the parts of the gradient of the ALiBi slopes.
struct SlopeSums {
  double* data;
  int64_t groups, batches, heads;

  SlopeSums(Arena& arena, const BackwardProblem& p, int64_t group_count)
      : data(arena.take<double>(p.grad_alibi_slopes ? group_count * p.batch * p.heads : 0)),
        groups(group_count),
        batches(p.batch),
        heads(p.heads) {}

  double& of(int64_t group, const Sequence& s, int64_t head) const {
    return data[(group * batches + s.batch) * heads + head];
  }
  double total(const Sequence& s, int64_t head) const {
    double sum = 0.0;
    for (int64_t group = 0; group < groups; ++group) sum += of(group, s, head);
    return sum;
  }
};

// A tile of queries (or of grad_out) as each product reads it.
template <class C>
struct BothWays {
  QueryOperand<C> operand;
  Matrix<const typename C::Element> lanes;  // (q, columns)
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
BothWays<C> both_ways(Source from, const Tile& tile, int64_t width, const BothWaysMemory<C>& memory, int64_t few) {
  using T = typename C::Scalar;
  const int64_t queries = tile.vectors * kLanes<T>;
  const auto rows = tile_rows<C>(from, tile, width, memory.rows);
  const QueryOperand<C> operand(memory.columns, tile, width, few);
  operand.pack(rows, tile);
  return {operand, lanes_of<C>(rows, queries, round_up(width, kLanes<T>), memory.lanes)};
}

// Room for weights and score gradients as the products read them where C pairs; else they stay where they were made.
template <class C>
struct GradientPairs {
  Matrix<typename C::Element> weight_by_query, by_query, by_key;

  GradientPairs(Arena& arena, int64_t padded_keys) {
    if constexpr (C::kPair == 2) {
      constexpr int64_t kWide = kQueries<typename C::Scalar>, kHalf = kWide / 2;
      weight_by_query = {arena.take<typename C::Element>(padded_keys * kHalf), kHalf};
      by_query = {arena.take<typename C::Element>(padded_keys * kHalf), kHalf};
      by_key = {arena.take<typename C::Element>(padded_keys / 2 * kWide), kWide};
    }
  }
};

template <class C>
struct BackwardScratch {
  using T = typename C::Scalar;
  using Element = typename C::Element;
  Element *key_rows, *key_lanes, *value_rows;
  T *weight, *grad_score, *softcap_grad, *dot, *bias, *grad_query, *grad_key, *grad_value, *logsumexp, *delta;
  BothWaysMemory<C> query, grad_out;
  GradientPairs<C> pairs;

  BackwardScratch(Arena& arena, const BackwardProblem& p, const BackwardShape<C>& shape)
      : query(arena, p.head_dim), grad_out(arena, p.head_dim_v), pairs(arena, shape.keys + kTileRows) {
    const int64_t padded_keys = shape.keys + kTileRows, block = padded_keys * kQueries<T>;
    const bool paired = C::kPair != 1;
    key_rows = arena.take<Element>(padded_keys * round_up(shape.depth, kLanes<Element>));
    key_lanes = arena.take<Element>(paired ? padded_keys * shape.columns : 0);
    value_rows = arena.take<Element>(padded_keys * round_up(shape.value_depth, kLanes<Element>));
    weight = arena.take<T>(block);
    grad_score = arena.take<T>(block);
    softcap_grad = arena.take<T>(score_mods_of(p).is_nonlinear() ? block : 0);
    dot = arena.take<T>(p.score_mod && p.score_mod->gradient ? block : 0);
    bias = arena.take<T>(p.has_tensor_mask() ? block : 0);
    grad_query = arena.take<T>(shape.adds_queries ? 0 : kQueries<T> * shape.columns);
    grad_key = arena.take<T>((shape.keys + 1) * shape.columns);
    grad_value = arena.take<T>((shape.keys + 1) * shape.value_columns);
    logsumexp = arena.take<T>(kLogsumexpNumbers<T>);
    delta = arena.take<T>(kQueries<T>);
  }
};

}  // namespace
}  // namespace attention_ext
