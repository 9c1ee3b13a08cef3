// The walk of every pass that finishes keys: key blocks outside, the queries that see them inside. grad_key and
// grad_value of a block are finished in scratch; grad_query is summed per key group and finished by finish_queries.
// Nothing depends on which thread runs what: sums that jobs share are kept apart until the last phase.
#pragma once

#include "cpu/kernels/backward_memory.h"
#include "cpu/kernels/dropout.h"

namespace attention_ext {
namespace {

// Job provides open_keys(k) and tile_block(tile, k) for some of the opened keys.
template <class C, class Job, class Problem, class Scratch>
class KeyBlocks {
  using T = typename C::Scalar;

 protected:
  KeyBlocks(const Problem& p, const BackwardShape<C>& shape, const BackwardShared<C>& shared, const Scratch& scratch)
      : p_(p), shape_(shape), shared_(shared), scratch_(scratch), dropout_(dropout_of(p)) {}

  void walk(int64_t job) {
    group_ = job % shape_.groups;
    const Range b = shape_.batches_of(job), h = shape_.kv_heads_of(job);
    for (int64_t batch = b.begin; batch < b.end; ++batch) {
      sequence_ = sequence_of(p_, batch);
      const int64_t rows = p_.cu_seqlens_k ? sequence_.length_k : p_.seqlen_k;
      const int64_t groups = minimum(groups_of(rows), shape_.groups);
      if (group_ >= groups) continue;
      for (kv_head_ = h.begin; kv_head_ < h.end; ++kv_head_) {
        for (int64_t k = group_ * kKeys; k < rows; k += groups * kKeys) block({k, minimum(k + kKeys, rows)});
      }
    }
  }

  Source head_rows(const View& view, int64_t head, int64_t row) const {
    return source_of(view, sequence_.tensor_batch, head, row);
  }
  // From the row of key k on.
  Matrix<T> grad_key(int64_t k) const {
    return {scratch_.grad_key + (k - rows_.begin) * shape_.columns, shape_.columns};
  }
  Matrix<T> grad_value(int64_t k) const {
    return {scratch_.grad_value + (k - rows_.begin) * shape_.value_columns, shape_.value_columns};
  }
  Matrix<T> grad_query(const Tile& tile) const {
    return rows_from(shared_.query_sums(p_, shape_, group_, sequence_, tile.head), tile.q.begin);
  }
  void add_to_slope_gradient(const Tile& tile, double sum) const {
    shared_.slope_sums[(group_ * p_.batch + sequence_.batch) * p_.heads + tile.head] += sum;
  }

  const Problem& p_;
  const BackwardShape<C>& shape_;
  const BackwardShared<C>& shared_;
  const Scratch& scratch_;
  Dropout dropout_;
  Sequence sequence_{};
  int64_t kv_head_ = 0;
  Range opened_{};      // the keys packed now
  int64_t unseen_ = 0;  // of them, the first ones that no query sees

 private:
  Job& self() { return static_cast<Job&>(*this); }

  void block(Range rows) {
    rows_ = rows;
    for (int64_t i = 0; i < (shape_.keys + 1) * shape_.columns; i += kLanes<T>) store(scratch_.grad_key + i, Vec<T>{});
    for (int64_t i = 0; i < (shape_.keys + 1) * shape_.value_columns; i += kLanes<T>) {
      store(scratch_.grad_value + i, Vec<T>{});
    }
    const Range seen = visible_keys(p_, sequence_, {0, sequence_.length_q});
    Range k{maximum(rows.begin, seen.begin), minimum(rows.end, seen.end)};
    if (!k.empty()) {
      unseen_ = k.begin % C::kPair;
      k.begin -= unseen_;
      opened_ = k;
      self().open_keys(k);
      for (int64_t g = 0; g < p_.group_size(); ++g) {
        for (int64_t t = 0; t < ceil_div(sequence_.length_q, kQueries<T>); ++t) {
          const Tile tile = tile_of<T>(sequence_, kv_head_ * p_.group_size() + g, t);
          for_each_part<C>(p_, tile, k, [&](const Tile& part, int64_t, Range keys) { self().tile_block(part, keys); });
        }
      }
    }
    if (p_.grad_key) write(p_.grad_key, rows, p_.head_dim, grad_key(rows.begin), p_.scale);
    if (p_.grad_value) write(p_.grad_value, rows, p_.head_dim_v, grad_value(rows.begin), dropout_.kept_scale);
  }

  void write(const View& to, Range rows, int64_t columns, Matrix<T> from, double factor) const {
    for (int64_t r = 0; r < rows.size(); ++r) scratch_.factor[r] = static_cast<T>(factor);
    write_rows(head_rows(to, kv_head_, sequence_.begin_k + rows.begin), rows.size(), columns, as_operand(from),
               scratch_.factor);
  }

  Range rows_{};  // the block's keys
  int64_t group_ = 0;
};

// The last phase: the groups' sums, in their order, become grad_query and the gradient of the slopes.
template <class C>
void finish_queries(const BackwardProblem& p, const BackwardShape<C>& shape, const BackwardShared<C>& shared,
                    const Sequence& s, int64_t head) {
  using T = typename C::Scalar;
  if (p.grad_alibi_slopes) {
    double sum = 0.0;
    for (int64_t group = 0; group < shape.groups; ++group) {
      sum += shared.slope_sums[(group * p.batch + s.batch) * p.heads + head];
    }
    p.grad_alibi_slopes[s.batch * p.heads + head] = sum;
  }
  if (!p.grad_query) return;
  const Matrix<T> total = shared.query_sums(p, shape, 0, s, head);
  for (int64_t group = 1; group < shape.groups; ++group) {
    const T* more = shared.query_sums(p, shape, group, s, head).data;
    for (int64_t i = 0; i < s.length_q * shape.columns; i += kLanes<T>) {
      store(total.data + i, load(total.data + i) + load(more + i));
    }
  }
  const T factor[] = {static_cast<T>(p.scale)};
  for (int64_t q = 0; q < s.length_q; ++q) {
    write_rows(source_of(p.grad_query, s.tensor_batch, head, s.begin_q + q), 1, p.head_dim,
               as_operand(rows_from(total, q)), factor);
  }
}

// Sum over queries of prob(sink) * f(q), the first derivative of anything by the sink of a head.
template <class T, class F>
ATTENTION_INLINE double sum_over_sink(const BackwardProblem& p, const Sequence& s, int64_t head, F&& f) {
  const T* logsumexp = row_pointer<T>(p.logsumexp, p, s, head);
  const double sink = p.sinks[s.batch * p.sinks_stride_b + head];
  double sum = 0.0;
  for (int64_t q = 0; q < s.length_q; ++q) {
    if (logsumexp[q] != static_cast<T>(-__builtin_inf()))
      sum += __builtin_exp(sink - static_cast<double>(logsumexp[q])) * f(q);
  }
  return sum;
}

}  // namespace
}  // namespace attention_ext
