// How the keys of a decoding call are split over jobs, and how the splits are merged.
#pragma once

#include "cpu/kernels/softmax.h"

namespace attention_ext {
namespace {

constexpr int64_t kKeysPerSplit = 8 * kKeys;  // fixed, or the last bits would depend on the rest of the batch

template <class C>
struct DecodeShape {
  using T = typename C::Scalar;
  int64_t width, columns;  // head_dim and head_dim_v in whole vectors
  int64_t group;           // heads that share keys and values
  int64_t rows;            // their queries
  int64_t splits, jobs;
  int64_t keys;

  explicit DecodeShape(const AttentionProblem& p) {
    width = round_up(p.head_dim, kLanes<T>);
    columns = round_up(p.head_dim_v, kLanes<T>);
    group = p.group_size();
    rows = group * p.max_seqlen_q;
    splits = maximum<int64_t>(ceil_div(p.max_seqlen_k, kKeysPerSplit), 1);
    jobs = p.batch * p.kv_heads * splits;
    keys = minimum(kKeys, round_up(p.max_seqlen_k, kLanes<T>));
  }
};

// Per split and query: the softmax state and the unnormalised out.
template <class C>
struct DecodeShared {
  using T = typename C::Scalar;
  T *maximum, *sum, *sums;  // (job, row), (job, row), (job, row, columns)

  DecodeShared(Arena& arena, const DecodeShape<C>& shape) {
    maximum = arena.take<T>(shape.jobs * shape.rows);
    sum = arena.take<T>(shape.jobs * shape.rows);
    sums = arena.take<T>(shape.jobs * shape.rows * shape.columns);
  }
};

// The softmax state of one query. Rescaling it for one more maximum gives the factor of that maximum's own sums.
template <class T>
struct MergedState {
  T maximum, sum, rescaled = 1;  // rescaled: the factor that the last rescaling applied to earlier sums

  T rescale(T added) {
    const T new_max = attention_ext::maximum(maximum, added);
    const Vec<T> base = finite_or_zero<T>(splat<T>(new_max)), log2e = splat<T>(static_cast<T>(kLog2E));
    rescaled = exp2<T>((splat<T>(maximum) - base) * log2e)[0];
    maximum = new_max;
    sum *= rescaled;
    return exp2<T>((splat<T>(added) - base) * log2e)[0];
  }
};

// The splits of a group of heads, and their sinks, become out and logsumexp.
template <class C>
void merge_splits(const AttentionProblem& problem, void* shared_memory, void*, int64_t job) {
  using T = typename C::Scalar;
  const auto& p = static_cast<const ForwardProblem&>(problem);
  if (!p.serves(job / p.kv_heads)) return;
  const DecodeShape<C> shape(p);
  Arena arena(shared_memory);
  const DecodeShared<C> shared(arena, shape);
  const Sequence s = sequence_of(p, job / p.kv_heads);
  int64_t row = job * shape.splits * shape.rows;
  for (int64_t g = 0; g < shape.group; ++g) {
    const int64_t head = job % p.kv_heads * shape.group + g;
    for (int64_t q = 0; q < s.length_q; ++q, ++row) {
      MergedState<T> state{shared.maximum[row], shared.sum[row]};
      const Matrix<T> total{shared.sums + row * shape.columns, shape.columns};
      for (int64_t split = 1; split < shape.splits; ++split) {
        const int64_t at = row + split * shape.rows;
        const Vec<T> added = splat<T>(state.rescale(shared.maximum[at])), rescaled = splat<T>(state.rescaled);
        const T* more = shared.sums + at * shape.columns;
        for (int64_t d = 0; d < shape.columns; d += kLanes<T>) {
          store(total.data + d, fma(load(more + d), added, load(total.data + d) * rescaled));
        }
        state.sum += shared.sum[at] * added[0];
      }
      state.rescaled = 1;
      if (p.sinks) state.sum += state.rescale(static_cast<T>(p.sinks[s.batch * p.sinks_stride_b + head]));
      const Vec<T> maximum = splat<T>(state.maximum), sum = splat<T>(state.sum);
      const int64_t at = row_of(p, s, head) + q;
      static_cast<T*>(p.logsumexp)[at] = logsumexp_of<T>(maximum, sum)[0];
      if (p.logsumexp_low) static_cast<T*>(p.logsumexp_low)[at] = logsumexp_low_of<T>(maximum, sum)[0];
      const T factor[] = {one_over<T>(splat<T>(state.sum))[0] * state.rescaled};
      write_rows(source_of(p.out, s.tensor_batch, head, s.begin_q + q), 1, p.head_dim_v, as_operand(total), factor);
    }
  }
}

}  // namespace
}  // namespace attention_ext
