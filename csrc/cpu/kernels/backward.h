// Gradients of every input from grad_out and grad_logsumexp, in three phases:
//   rows     delta = rowsum(grad_out * out) - grad_logsumexp, sink gradients; the sums of grad_query become 0
//   blocks   keys outside, queries inside: weights again from logsumexp, then the five products; grad_key and
//   grad_value of
//            a block are finished in scratch, grad_query is summed per key group
//   queries  the groups' sums, in their order, become grad_query
// Nothing depends on which thread runs what: sums that jobs share are kept apart until the last phase.
#pragma once

#include "cpu/kernels/backward_memory.h"
#include "cpu/kernels/gradient.h"
#include "cpu/kernels/probability.h"

namespace attention_ext {
namespace {

template <class C>
class BackwardRows {
  using T = typename C::Scalar;

 public:
  static void run(const AttentionProblem& problem, void* shared_memory, void*, int64_t job) {
    const auto& p = static_cast<const BackwardProblem&>(problem);
    const BackwardShape<C> shape(p);
    Arena arena(shared_memory);
    const BackwardShared<C> shared(arena, p, shape);
    const int64_t head = job % p.heads;
    const Sequence s = sequence_of(p, job / p.heads);
    T* delta = shared.delta + row_of(p, s, head);
    const T* grad_logsumexp = row_pointer<T>(p.grad_logsumexp, p, s, head);
    const T* logsumexp = row_pointer<T>(p.logsumexp, p, s, head);
    double sink_gradient = 0.0;
    for (int64_t q = 0; q < s.length_q; ++q) {
      const T product = p.head_dim_v == 0 ? T(0) : row_product(p, s, head, q);
      delta[q] = product - (grad_logsumexp ? grad_logsumexp[q] : T(0));
      if (p.grad_sinks && logsumexp[q] != static_cast<T>(-__builtin_inf())) {
        sink_gradient -= __builtin_exp(p.sinks[s.batch * p.sinks_stride_b + head] - static_cast<double>(logsumexp[q])) *
                         static_cast<double>(delta[q]);
      }
    }
    if (p.grad_sinks) p.grad_sinks[s.batch * p.heads + head] = sink_gradient;
    for (int64_t group = 0; group < shape.groups; ++group) {
      T* sums = shared.query_sums(p, shape, group, s, head).data;
      for (int64_t i = 0; i < (s.length_q + 1) * shape.columns; i += kLanes<T>) store(sums + i, Vec<T>{});
      shared.slope_sums[(group * p.batch + s.batch) * p.heads + head] = 0.0;
    }
  }

 private:
  static T row_product(const BackwardProblem& p, const Sequence& s, int64_t head, int64_t q) {
    const Source a = source_of(p.out, s.tensor_batch, head, s.begin_q + q);
    const Source b = source_of(p.grad_out, s.tensor_batch, head, s.begin_q + q);
    Vec<T> sum{};
    with_storage<T>(a.dtype, [&](auto* storage) __attribute__((always_inline)) {
      const auto* x = reinterpret_cast<decltype(storage)>(const_cast<char*>(a.data));
      const auto* y = reinterpret_cast<decltype(storage)>(const_cast<char*>(b.data));
      for (int64_t d = 0; d < p.head_dim_v; d += kLanes<T>) {
        sum = fma(load_strided<T>(x + d * a.stride_col, a.stride_col, p.head_dim_v - d),
                  load_strided<T>(y + d * b.stride_col, b.stride_col, p.head_dim_v - d), sum);
      }
    });
    return sum_lanes<T>(sum);
  }
};

template <class C>
class BackwardBlocks {
  using T = typename C::Scalar;
  using Element = typename C::Element;

 public:
  static void run(const AttentionProblem& problem, void* shared, void* scratch, int64_t job) {
    const auto& p = static_cast<const BackwardProblem&>(problem);
    Arena shared_arena(shared), scratch_arena(scratch);
    BackwardBlocks(p, shared_arena, scratch_arena).walk(job);
  }

 private:
  BackwardBlocks(const BackwardProblem& p, Arena& shared, Arena& scratch)
      : p_(p), shape_(p), shared_(shared, p, shape_), scratch_(scratch, p, shape_), dropout_(dropout_of(p)) {}

  void walk(int64_t job) {
    group_ = job % shape_.groups;
    const Range b = shape_.batches_of(job), h = shape_.kv_heads_of(job);
    for (int64_t batch = b.begin; batch < b.end; ++batch) {
      sequence_ = sequence_of(p_, batch);
      const int64_t rows = p_.cu_seqlens_k ? sequence_.length_k : p_.seqlen_k;
      for (kv_head_ = h.begin; kv_head_ < h.end; ++kv_head_) {
        for (int64_t k = group_ * kKeys; k < rows; k += shape_.groups * kKeys) {
          key_block({k, minimum(k + kKeys, rows)});
        }
      }
    }
  }

  void key_block(Range rows) {
    const int64_t row = sequence_.begin_k + rows.begin, b = sequence_.tensor_batch;
    for (int64_t i = 0; i < (shape_.keys + 1) * shape_.columns; i += kLanes<T>) store(scratch_.grad_key + i, Vec<T>{});
    for (int64_t i = 0; i < (shape_.keys + 1) * shape_.value_columns; i += kLanes<T>)
      store(scratch_.grad_value + i, Vec<T>{});
    const Range k{rows.begin, minimum(rows.end, sequence_.length_k)};
    if (!k.empty()) {
      const int64_t padded = round_up(k.size(), kTileRows);
      key_ = rows_of<C>(source_of(p_.key, b, kv_head_, row), k.size(), padded, p_.head_dim, scratch_.key_rows);
      value_ = rows_of<C>(source_of(p_.value, b, kv_head_, row), k.size(), padded, p_.head_dim_v, scratch_.value_rows);
      key_lanes_ = lanes_of<C>(key_, padded, shape_.columns, scratch_.key_lanes);
      for (int64_t g = 0; g < p_.group_size(); ++g) {
        for (int64_t t = 0; t < ceil_div(sequence_.length_q, kQueries<T>); ++t) {
          const Tile tile = tile_of<T>(sequence_, kv_head_ * p_.group_size() + g, t);
          const Range seen = visible_keys(p_, sequence_, tile.q);
          const Range part{maximum(k.begin, seen.begin - seen.begin % C::kPair), minimum(k.end, seen.end)};
          if (!part.empty()) tile_block(tile, part, part.begin - k.begin);
        }
      }
    }
    if (p_.grad_key) write(p_.grad_key, row, rows.size(), p_.head_dim, scratch_.grad_key, shape_.columns, p_.scale);
    if (p_.grad_value) {
      write(p_.grad_value, row, rows.size(), p_.head_dim_v, scratch_.grad_value, shape_.value_columns,
            dropout_.kept_scale);
    }
  }

  // skip: rows of the packed block before k.
  void tile_block(const Tile& tile, Range k, int64_t skip) {
    Block<T> block;
    if (!open_block(p_, tile, k, Matrix<T>{scratch_.bias, kQueries<T>}, block)) return;
    open_queries(tile);
    const Matrix<T> weight{scratch_.weight, kQueries<T>}, grad_score{scratch_.grad_score, kQueries<T>};
    const int64_t rows = round_up(k.size(), 2);
    const Matrix<const Element> key{key_.row(skip), key_.stride}, value{value_.row(skip), value_.stride};
    multiply<C>(by_rows(key), query_.columns, shape_.depth, weight, rows, tile.vectors, Start::kZero);
    multiply<C>(by_rows(value), grad_out_.columns, shape_.value_depth, grad_score, rows, tile.vectors, Start::kZero);

    const Matrix<T> slope{block.mods.softcap ? scratch_.slope : nullptr, kQueries<T>};
    with_constants(tile.vectors, block.rules, [&](auto vectors, auto rules) {
      probability_block<C, vectors, rules>(block, weight, scratch_.logsumexp, slope);
    });
    score_gradient(p_, dropout_, tile, k, weight, grad_score, scratch_.delta);
    if (p_.grad_attn_mask) add_to_mask_gradient(p_.grad_attn_mask, tile, k, as_operand(grad_score));
    if (p_.grad_alibi_slopes) {
      shared_.slope_sums[(group_ * p_.batch + sequence_.batch) * p_.heads + tile.head] +=
          slope_gradient(block, tile.vectors, as_operand(grad_score));
    }
    if (slope.data) multiply_elements(slope, grad_score, k.size(), tile.vectors);
    clear_spare_row(weight, k.size(), tile.vectors);
    clear_spare_row(grad_score, k.size(), tile.vectors);

    const int64_t queries = ceil_div(tile.q.size(), C::kPair);
    if (p_.grad_value) {
      const auto by_query = weights_by_queries<C>(weight, rows, tile.vectors, scratch_.weight_rows);
      multiply<C>(by_rows(by_query), grad_out_.lanes, queries,
                  grad_matrix(scratch_.grad_value, skip, shape_.value_columns), rows, shape_.value_columns / kLanes<T>,
                  Start::kAdd);
    }
    if (p_.grad_key) {
      const auto by_query = weights_by_queries<C>(grad_score, rows, tile.vectors, scratch_.weight_rows);
      multiply<C>(by_rows(by_query), query_.lanes, queries, grad_matrix(scratch_.grad_key, skip, shape_.columns), rows,
                  shape_.columns / kLanes<T>, Start::kAdd);
    }
    if (p_.grad_query) {
      const auto by_key = weights_by_keys<C>(grad_score, k.size(), tile.vectors, scratch_.weight_rows);
      Matrix<T> sums = shared_.query_sums(p_, shape_, group_, sequence_, tile.head);
      sums.data = sums.row(tile.q.begin);
      const Matrix<const Element> key_lanes{key_lanes_.row(skip / C::kPair), key_lanes_.stride};
      multiply<C>(by_columns(by_key), key_lanes, ceil_div(k.size(), C::kPair), sums, round_up(tile.q.size(), 2),
                  shape_.columns / kLanes<T>, Start::kAdd);
    }
  }

  void open_queries(const Tile& tile) {
    const int64_t row = sequence_.begin_q + tile.q.begin, b = sequence_.tensor_batch;
    query_ = both_ways<C>(source_of(p_.query, b, tile.head, row), tile, p_.head_dim, scratch_.query);
    grad_out_ = both_ways<C>(source_of(p_.grad_out, b, tile.head, row), tile, p_.head_dim_v, scratch_.grad_out);
    load_logsumexp(row_pointer<T>(p_.logsumexp, p_, sequence_, tile.head) + tile.q.begin, tile, scratch_.logsumexp);
    const T* delta = shared_.delta + row_of(p_, sequence_, tile.head) + tile.q.begin;
    for (int64_t lane = 0; lane < tile.vectors * kLanes<T>; ++lane) {
      scratch_.delta[lane] = lane < tile.q.size() ? delta[lane] : T(0);
    }
  }

  Matrix<T> grad_matrix(T* data, int64_t skip, int64_t columns) const { return {data + skip * columns, columns}; }

  void write(const View& to, int64_t row, int64_t rows, int64_t columns, const T* from, int64_t stride, double factor) {
    for (int64_t r = 0; r < rows; ++r) scratch_.factor[r] = static_cast<T>(factor);
    write_rows(source_of(to, sequence_.tensor_batch, kv_head_, row), rows, columns, Matrix<const T>{from, stride},
               scratch_.factor);
  }

  const BackwardProblem& p_;
  BackwardShape<C> shape_;
  BackwardShared<C> shared_;
  BackwardScratch<C> scratch_;
  Dropout dropout_;
  Sequence sequence_{};
  int64_t kv_head_ = 0, group_ = 0;
  Matrix<const Element> key_, key_lanes_, value_;
  BothWays<C> query_, grad_out_;
};

template <class C>
void run_backward_queries(const AttentionProblem& problem, void* shared_memory, void*, int64_t job) {
  using T = typename C::Scalar;
  const auto& p = static_cast<const BackwardProblem&>(problem);
  const BackwardShape<C> shape(p);
  Arena arena(shared_memory);
  const BackwardShared<C> shared(arena, p, shape);
  const int64_t head = job % p.heads;
  const Sequence s = sequence_of(p, job / p.heads);
  if (p.grad_alibi_slopes) {
    double& sum = p.grad_alibi_slopes[s.batch * p.heads + head];
    sum = 0.0;
    for (int64_t group = 0; group < shape.groups; ++group) {
      sum += shared.slope_sums[(group * p.batch + s.batch) * p.heads + head];
    }
  }
  if (!p.grad_query) return;
  const Matrix<T> total = shared.query_sums(p, shape, 0, s, head);
  for (int64_t group = 1; group < shape.groups; ++group) {
    const T* more = shared.query_sums(p, shape, group, s, head).data;
    for (int64_t i = 0; i < s.length_q * shape.columns; i += kLanes<T>)
      store(total.data + i, load(total.data + i) + load(more + i));
  }
  const T factor[] = {static_cast<T>(p.scale)};
  for (int64_t q = 0; q < s.length_q; ++q) {
    write_rows(source_of(p.grad_query, s.tensor_batch, head, s.begin_q + q), 1, p.head_dim,
               Matrix<const T>{total.row(q), total.stride}, factor);
  }
}

template <class C>
Plan plan_backward(const AttentionProblem& problem) {
  const auto& p = static_cast<const BackwardProblem&>(problem);
  const BackwardShape<C> shape(p);
  Arena shared(nullptr), scratch(nullptr);
  BackwardShared<C>(shared, p, shape);
  BackwardScratch<C>(scratch, p, shape);
  Plan plan;
  plan.phases[plan.phase_count++] = {p.batch * p.heads, BackwardRows<C>::run};
  plan.phases[plan.phase_count++] = {shape.jobs, BackwardBlocks<C>::run};
  plan.phases[plan.phase_count++] = {p.batch * p.heads, run_backward_queries<C>};
  plan.shared_bytes = shared.used();
  plan.scratch_bytes = scratch.used();
  return plan;
}

}  // namespace
}  // namespace attention_ext
