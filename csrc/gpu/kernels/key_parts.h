// Keys in parts. Where the tiles of queries are too few for a GPU, several blocks of threads share the keys of each,
// and what they find is merged.
#pragma once

#include "core/dropout.h"
#include "gpu/kernels/rows.h"
#include "gpu/kernels/softmax.h"

namespace attention_ext {
namespace {

constexpr int64_t kKeysForPart = 256;  // one more part for fewer does not repay the merging

// How many parts the keys of every tile have, if `tiles` tiles of `queries` queries each share a GPU: enough for two
// blocks of threads on each of its multiprocessors, unless the tiles alone occupy most of these.
ATTENTION_INLINE int64_t count_of_parts(const AttentionProblem& p, int64_t tiles, int64_t queries) {
  if (p.key_parts > 0) return p.key_parts;
  if (tiles == 0 || tiles * 5 >= p.multiprocessors * 4) return 1;
  const int64_t seen = minimum(p.max_seqlen_k, minimum(queries, p.max_seqlen_q) + p.window_left + p.window_right);
  return clamp(2 * p.multiprocessors / tiles, 1, maximum<int64_t>(1, ceil_div(seen, kKeysForPart)));
}

template <int kQueries>
struct QueryTiles {
  ATTENTION_INLINE static int64_t count(const AttentionProblem& p) { return QueryTileIndex::count(p, kQueries); }
  ATTENTION_INLINE static int64_t parts(const AttentionProblem& p) { return count_of_parts(p, count(p), kQueries); }
};

// A part of the keys that a tile of queries sees, in whole tiles of `rows` keys: parts of one sequence are alike
// whatever else is in the batch. Some are empty where keys are few.
ATTENTION_INLINE Range part_of_keys(Range seen, int64_t rows, int64_t part, int64_t parts) {
  const int64_t first = seen.begin / rows, tiles = ceil_div(seen.end, rows) - first;
  return {maximum(seen.begin, (first + tiles * part / parts) * rows),
          minimum(seen.end, (first + tiles * (part + 1) / parts) * rows)};
}

template <class T>
struct SoftmaxState {
  T maximum, sum;  // sum of exp(score - maximum)
};

template <class T>
ATTENTION_DEVICE T rescaling(T maximum, const SoftmaxState<T>& to) {
  return exp2_of((maximum - finite_or_zero(to.maximum)) * static_cast<T>(kLog2E));
}

// Of one query, over the keys of all parts; state(i) is that of a part.
template <class T, class State>
ATTENTION_DEVICE SoftmaxState<T> merged_state(int64_t parts, State&& state) {
  SoftmaxState<T> all{-infinity<T>(), T(0)};
  for (int64_t i = 0; i < parts; ++i) all.maximum = larger(state(i).maximum, all.maximum);
  for (int64_t i = 0; i < parts; ++i) all.sum += state(i).sum * rescaling(state(i).maximum, all);
  return all;
}

// Likewise a column of the query's sum of weights times values. That of a part without visible keys is not read.
template <class T, class State, class Number>
ATTENTION_DEVICE T merged_number(int64_t parts, const SoftmaxState<T>& all, State&& state, Number&& number) {
  T total = 0;
  for (int64_t i = 0; i < parts; ++i) {
    if (state(i).sum != T(0)) total = multiply_add(number(i), rescaling(state(i).maximum, all), total);
  }
  return total;
}

template <class T>
ATTENTION_DEVICE T logsumexp_of(const SoftmaxState<T>& state) {
  return multiply_add(log2_of(state.sum), static_cast<T>(kLn2), state.maximum);
}

// The factor of sums of weights times values.
template <class T>
ATTENTION_DEVICE T normalising(const ForwardProblem& p, const SoftmaxState<T>& state) {
  return state.sum == T(0) ? T(0) : static_cast<T>(dropout_of(p).kept_scale) / state.sum;
}

// A row for each part and query: the softmax state, then the sums of weights times values. Queries are counted as in
// logsumexp, so that of packed sequences there are as many as in the tensors, however long any of them may be.
template <class T>
class PartsWorkspace {
 public:
  static constexpr int kState = 2;  // numbers

  ATTENTION_DEVICE PartsWorkspace(const AttentionProblem& p, void* workspace)
      : data_(static_cast<T*>(workspace)), queries_(queries(p)), width_(width(p)) {}

  ATTENTION_INLINE static int64_t queries(const AttentionProblem& p) {
    return (p.cu_seqlens_q ? 1 : p.batch) * p.heads * p.seqlen_q;
  }
  ATTENTION_INLINE static int64_t width(const AttentionProblem& p) { return kState + p.head_dim_v; }
  static size_t bytes(const AttentionProblem& p, int64_t parts) {
    return static_cast<size_t>(parts * queries(p) * width(p)) * sizeof(T);
  }

  ATTENTION_DEVICE T* sums(int64_t part, int64_t query) const {
    return data_ + (part * queries_ + query) * width_ + kState;
  }
  ATTENTION_DEVICE SoftmaxState<T> state(int64_t part, int64_t query) const {
    const T* const row = sums(part, query);
    return {row[-2], row[-1]};
  }
  ATTENTION_DEVICE void set_state(int64_t part, int64_t query, const SoftmaxState<T>& state) const {
    T* const row = sums(part, query);
    row[-2] = state.maximum;
    row[-1] = state.sum;
  }

 private:
  T* data_;
  int64_t queries_, width_;
};

// A thread for each number of out. What it writes for queries that no sequence owns is cleared afterwards.
template <class C, class Tiles>
struct MergeParts {
  using T = typename C::Scalar;
  using E = typename C::Element;
  using Problem = ForwardProblem;
  static constexpr int kThreads = 128;
  static constexpr size_t kSharedBytes = 0;

  static int64_t blocks(const AttentionProblem& p) {
    return ceil_div(PartsWorkspace<T>::queries(p) * threads_of_query(p), kThreads);
  }

  ATTENTION_DEVICE static void run(const ForwardProblem& p, void* workspace) {
    const int64_t queries = PartsWorkspace<T>::queries(p), parts = Tiles::parts(p);
    const int64_t at = block_index() * kThreads + thread_index();
    const int64_t query = at / threads_of_query(p), d = at % threads_of_query(p);
    if (query >= queries) return;
    const PartsWorkspace<T> memory(p, workspace);
    const auto state = [&](int64_t i) { return memory.state(i, query); };
    const SoftmaxState<T> all = merged_state<T>(parts, state);
    if (d == 0) static_cast<T*>(p.logsumexp)[query] = logsumexp_of(all);
    if (d >= p.head_dim_v) return;
    const auto number = [&](int64_t i) { return memory.sums(i, query)[d]; };
    const int64_t head = query / p.seqlen_q;
    const Rows<E> out = rows_of<E>(p.out, head / p.heads, head % p.heads, query % p.seqlen_q, p.head_dim_v);
    out.data[d * out.stride_col] = rounded<E>(merged_number(parts, all, state, number) * normalising(p, all));
  }

 private:
  ATTENTION_INLINE static int64_t threads_of_query(const AttentionProblem& p) {
    return maximum<int64_t>(1, p.head_dim_v);
  }
};

template <class C, class Tiles>
void add_merging(KernelPlan& plan, const AttentionProblem& p) {
  set_workspace(plan, PartsWorkspace<typename C::Scalar>::bytes(p, Tiles::parts(p)));
  add_launch<MergeParts<C, Tiles>>(plan, MergeParts<C, Tiles>::blocks(p));
}

}  // namespace
}  // namespace attention_ext
