// Gradients of every input from grad_out and grad_logsumexp, in three or four phases:
//   rows     delta = rowsum(grad_out * out) - grad_logsumexp; the sums of grad_query become 0
//   delta    only where a 16-bit out is too coarse: the same from sums that were never rounded (delta.h)
//   blocks   weights again from logsumexp, block by block, then the five products
//   queries  what was summed apart becomes grad_query and the gradients of slopes and sinks
#pragma once

#include "cpu/kernels/delta.h"
#include "cpu/kernels/gradient.h"
#include "cpu/kernels/key_blocks.h"
#include "cpu/kernels/probability.h"

namespace attention_ext {
namespace {

template <class C>
void run_backward_rows(const AttentionProblem& problem, void* shared_memory, void*, int64_t job) {
  using T = typename C::Scalar;
  const auto& p = static_cast<const BackwardProblem&>(problem);
  const BackwardShape<C> shape(p);
  Arena arena(shared_memory);
  const BackwardShared<C> shared(arena, p, shape);
  const int64_t head = job % p.heads;
  const Sequence s = sequence_of(p, job / p.heads);
  T* delta = shared.delta + row_of(p, s, head);
  const T* grad_logsumexp = row_pointer<T>(p.grad_logsumexp, p, s, head);
  for (int64_t q = 0; q < s.length_q; ++q) {
    delta[q] = grad_logsumexp ? -grad_logsumexp[q] : T(0);
    if (p.head_dim_v == 0) continue;
    delta[q] += dot_rows<T>(source_of(p.out, s.tensor_batch, head, s.begin_q + q),
                            source_of(p.grad_out, s.tensor_batch, head, s.begin_q + q), p.head_dim_v);
  }
  for (int64_t group = 0; group < shape.groups; ++group) {
    shared.slope_sums[(group * p.batch + s.batch) * p.heads + head] = 0.0;
    if (!p.grad_query) continue;
    T* sums = shared.query_sums(p, shape, group, s, head).data;
    for (int64_t i = 0; i < (s.length_q + 1) * shape.columns; i += kLanes<T>) store(sums + i, Vec<T>{});
  }
}

template <class C>
class BackwardBlocks : KeyBlocks<C, BackwardBlocks<C>, BackwardProblem, BackwardScratch<C>> {
  using Blocks = KeyBlocks<C, BackwardBlocks<C>, BackwardProblem, BackwardScratch<C>>;
  using T = typename C::Scalar;
  using Element = typename C::Element;
  friend Blocks;

 public:
  static void run(const AttentionProblem& problem, void* shared_memory, void* scratch_memory, int64_t job) {
    const auto& p = static_cast<const BackwardProblem&>(problem);
    const BackwardShape<C> shape(p);
    Arena shared_arena(shared_memory), scratch_arena(scratch_memory);
    const BackwardShared<C> shared(shared_arena, p, shape);
    const BackwardScratch<C> scratch(scratch_arena, p, shape);
    BackwardBlocks(p, shape, shared, scratch).walk(job);
  }

 private:
  using Blocks::Blocks;
  using Blocks::dropout_, Blocks::kv_head_, Blocks::opened_, Blocks::p_, Blocks::scratch_, Blocks::sequence_,
      Blocks::shape_, Blocks::shared_, Blocks::unseen_;

  void open_keys(Range k) {
    const int64_t row = sequence_.begin_k + k.begin, padded = round_up(k.size(), 2);
    key_ =
        rows_of<C>(this->head_rows(p_.key, kv_head_, row), k.size(), padded, p_.head_dim, scratch_.key_rows, unseen_);
    value_ = rows_of<C>(this->head_rows(p_.value, kv_head_, row), k.size(), padded, p_.head_dim_v, scratch_.value_rows,
                        unseen_);
    key_lanes_ = lanes_of<C>(key_, padded, shape_.columns, scratch_.key_lanes);
  }

  void tile_block(const Tile& tile, Range keys) {
    Block<T> block;
    if (!open_block(p_, tile, keys, Matrix<T>{scratch_.bias, kQueries<T>}, block)) return;
    const Range k = block.k;
    const int64_t skip = k.begin - opened_.begin;
    const int64_t row = sequence_.begin_q + tile.q.begin, rows = round_up(k.size(), 2);
    const BothWays<C> query =
        both_ways<C>(this->head_rows(p_.query, tile.head, row), tile, p_.head_dim, scratch_.query);
    const BothWays<C> grad_out =
        both_ways<C>(this->head_rows(p_.grad_out, tile.head, row), tile, p_.head_dim_v, scratch_.grad_out);
    load_logsumexp(row_pointer<T>(p_.logsumexp, p_, sequence_, tile.head) + tile.q.begin, tile, scratch_.logsumexp);
    load_rows(shared_.delta + row_of(p_, sequence_, tile.head) + tile.q.begin, tile, scratch_.delta);

    const Matrix<T> weight{scratch_.weight, kQueries<T>}, grad_score{scratch_.grad_score, kQueries<T>};
    multiply<C>(by_rows(rows_from(key_, skip)), query.columns, shape_.depth, weight, rows, tile.vectors, Start::kZero);
    multiply<C>(by_rows(rows_from(value_, skip)), grad_out.columns, shape_.value_depth, grad_score, rows, tile.vectors,
                Start::kZero);

    const Matrix<T> slope{block.mods.softcap ? scratch_.slope : nullptr, kQueries<T>};
    with_constants(tile.vectors, block.rules, [&](auto vectors, auto rules) {
      probability_block<C, vectors, rules>(block, weight, scratch_.logsumexp, {slope, {}});
    });
    score_gradient(p_, dropout_, tile, k, weight, grad_score, scratch_.delta);
    if (p_.grad_attn_mask) add_to_mask_gradient(p_.grad_attn_mask, tile, k, as_operand(grad_score));
    if (p_.grad_alibi_slopes) {
      this->add_to_slope_gradient(tile, slope_gradient(block, tile.vectors, as_operand(grad_score)));
    }
    if (slope.data) multiply_elements(slope, grad_score, k.size(), tile.vectors);
    clear_spare_row(weight, k.size(), tile.vectors);
    clear_spare_row(grad_score, k.size(), tile.vectors);

    const int64_t queries = ceil_div(tile.q.size(), C::kPair);
    if (p_.grad_value) {
      const auto by_query = weights_by_queries<C>(weight, rows, tile.vectors, scratch_.weight_rows);
      multiply<C>(by_rows(by_query), grad_out.lanes, queries, this->grad_value(k.begin), rows,
                  shape_.value_columns / kLanes<T>, Start::kAdd);
    }
    if (p_.grad_key) {
      const auto by_query = weights_by_queries<C>(grad_score, rows, tile.vectors, scratch_.weight_rows);
      multiply<C>(by_rows(by_query), query.lanes, queries, this->grad_key(k.begin), rows, shape_.columns / kLanes<T>,
                  Start::kAdd);
    }
    if (p_.grad_query) {
      const auto by_key = weights_by_keys<C>(grad_score, k.size(), tile.vectors, scratch_.weight_rows);
      multiply<C>(by_columns(by_key), rows_from(key_lanes_, skip / C::kPair), ceil_div(k.size(), C::kPair),
                  this->grad_query(tile), round_up(tile.q.size(), 2), shape_.columns / kLanes<T>, Start::kAdd);
    }
  }

  Matrix<const Element> key_, key_lanes_, value_;
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
  finish_queries(p, shape, shared, s, head);
  if (p.grad_sinks) {
    const T* delta = shared.delta + row_of(p, s, head);
    p.grad_sinks[s.batch * p.heads + head] =
        sum_over_sink<T>(p, s, head, [&](int64_t q) { return -static_cast<double>(delta[q]); });
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
  plan.phases[plan.phase_count++] = {p.batch * p.heads, run_backward_rows<C>};
  add_delta_phase(p, plan);
  plan.phases[plan.phase_count++] = {shape.jobs, BackwardBlocks<C>::run};
  plan.phases[plan.phase_count++] = {p.batch * p.heads, run_backward_queries<C>};
  plan.shared_bytes = shared.used();
  plan.scratch_bytes = maximum(plan.scratch_bytes, scratch.used());
  return plan;
}

}  // namespace
}  // namespace attention_ext
