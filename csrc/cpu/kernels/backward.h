// Gradients of every input from grad_out and grad_logsumexp, in phases:
//   shares   only with a sparse mask: which keys each group of jobs takes (query_sums.h)
//   rows     delta = rowsum(grad_out * out) - grad_logsumexp; sums that several jobs share become 0
//   delta    only where a 16-bit out is too coarse: the same from sums that were never rounded (delta.h)
//   blocks   weights again from logsumexp, block by block, then the five products
//   queries  the jobs' sums become grad_query (unless one block held all keys) and the gradients of slopes and sinks
// A job of the blocks finishes keys: key blocks outside, the queries that see them inside. Nothing depends on which
// thread runs what: sums that jobs share are kept apart until the last phase.
#pragma once

#include "cpu/kernels/backward_queries.h"
#include "cpu/kernels/gradient.h"
#include "cpu/kernels/tile_parts.h"

namespace attention_ext {
namespace {

// Of the gradients of captured tensors, 0 where none are wanted.
inline int64_t sum_copies(const BackwardProblem& p) { return p.score_mod ? p.score_mod->copies : 0; }

template <class C>
class BackwardBlocks {
  using T = typename C::Scalar;
  using Element = typename C::Element;

 public:
  static void run(const AttentionProblem& problem, void* shared_memory, void* scratch_memory, int64_t job) {
    const auto& p = static_cast<const BackwardProblem&>(problem);
    const BackwardShape<C> shape(p);
    const GradientJobs jobs = backward_jobs(p);
    Arena shared_arena(shared_memory), scratch_arena(scratch_memory);
    const BackwardShared<C> shared(shared_arena, p, shape, jobs);
    const BackwardScratch<C> scratch(scratch_arena, p, shape);
    if (sum_copies(p) == 0) return BackwardBlocks(p, shape, shared, scratch, 0).mainloop(jobs, job);
    // Jobs that add to the same copy of sums run one after another.
    const int64_t copies = sum_copies(p);
    for (int64_t part = job * jobs.count / copies; part < (job + 1) * jobs.count / copies; ++part) {
      BackwardBlocks(p, shape, shared, scratch, job).mainloop(jobs, part);
    }
  }

 private:
  BackwardBlocks(const BackwardProblem& p, const BackwardShape<C>& shape, const BackwardShared<C>& shared,
                 const BackwardScratch<C>& scratch, int64_t copy)
      : p_(p), shape_(shape), shared_(shared), scratch_(scratch), dropout_(dropout_of(p)), copy_(copy) {}

  void mainloop(const GradientJobs& jobs, int64_t job) {
    group_ = jobs.group_of(job);
    const Range b = jobs.batches_of(job), h = jobs.kv_heads_of(job);
    for (int64_t batch = b.begin; batch < b.end; ++batch) {
      sequence_ = sequence_of(p_, batch);
      const int64_t rows = key_rows_of(p_, sequence_);
      if (group_ >= jobs.groups_for(rows)) continue;
      for (kv_head_ = h.begin; kv_head_ < h.end; ++kv_head_) {
        share_ = shared_.query_sums.share(group_, sequence_, kv_head_);
        if (share_.keys.empty() && rows > 0) continue;
        int64_t k = share_.keys.begin;
        do block({k, minimum(k + kKeys, share_.keys.end)});  // also without keys: grad_query is 0 then
        while ((k += share_.step) < share_.keys.end);
      }
    }
  }

  void block(Range rows) {
    rows_ = rows;
    clear_lanes(scratch_.grad_key, (shape_.keys + 1) * shape_.columns);
    clear_lanes(scratch_.grad_value, (shape_.keys + 1) * shape_.value_columns);
    queries_ = {0, sequence_.length_q};
    const Range seen = visible_keys(p_, sequence_, queries_);
    Range k{maximum(rows.begin, seen.begin), minimum(rows.end, seen.end)};
    if (p_.sparse_mask) {
      const Shown shown = shown_of(p_, sequence_, kv_head_, rows);
      k = shown.keys;
      if (!finishes_queries()) queries_ = shown.queries;
    }
    if (!k.empty()) {
      pair_padding_ = k.begin % C::kPair;
      k.begin -= pair_padding_;
      packed_kv_ = k;
      pack_keys(k);
    }
    for (int64_t g = 0; g < p_.group_size(); ++g) {
      for (int64_t t = queries_.begin / kQueries<T>; t < ceil_div(queries_.end, kQueries<T>); ++t) {
        process_tile(tile_of<T>(sequence_, kv_head_ * p_.group_size() + g, t), k);
      }
    }
    const int64_t row = sequence_.begin_k + rows.begin;
    if (p_.grad_key) write(p_.grad_key, kv_head_, row, rows, p_.head_dim, grad_key(rows.begin), p_.scale);
    if (p_.grad_value) {
      write(p_.grad_value, kv_head_, row, rows, p_.head_dim_v, grad_value(rows.begin), dropout_.kept_scale);
    }
  }

  // One block holds all keys then.
  bool finishes_queries() const { return p_.grad_query && !shape_.adds_queries; }

  void process_tile(const Tile& tile, Range k) {
    const bool finishes = finishes_queries();
    const Matrix<T> sums{scratch_.grad_query, shape_.columns};
    if (finishes) clear_block(sums, kQueries<T>, shape_.columns / kLanes<T>);
    for_each_part<C>(p_, tile, k, [&](const Tile& part, int64_t lane, Range keys) {
      tile_block(part, keys, shape_.adds_queries ? grad_query_sums(part) : rows_from(sums, lane));
    });
    if (finishes) {
      write(p_.grad_query, tile.head, sequence_.begin_q + tile.q.begin, tile.q, p_.head_dim, sums, p_.scale);
    }
  }

  void write(const View& to, int64_t head, int64_t row, Range rows, int64_t columns, Matrix<T> from,
             double factor) const {
    const auto one_factor = static_cast<T>(factor);
    write_rows(head_rows(to, head, row), rows.size(), columns, as_operand(from), &one_factor, 0);
  }

  void pack_keys(Range k) {
    const int64_t row = sequence_.begin_k + k.begin, padded = round_up(k.size(), 2);
    key_ =
        rows_of<C>(head_rows(p_.key, kv_head_, row), k.size(), padded, p_.head_dim, scratch_.key_rows, pair_padding_);
    value_ = rows_of<C>(head_rows(p_.value, kv_head_, row), k.size(), padded, p_.head_dim_v, scratch_.value_rows,
                        pair_padding_);
    key_lanes_ = lanes_of<C>(key_, padded, shape_.columns, scratch_.key_lanes);
  }

  // While a product runs, the rows that come next are on their way: the next tile's, and those to be written.
  void tile_block(const Tile& tile, Range keys, Matrix<T> grad_query) {
    Block<T> block;
    if (!make_block(p_, tile, keys, Matrix<T>{scratch_.bias, kQueries<T>}, block)) return;
    const Range k = block.k;
    const int64_t skip = k.begin - packed_kv_.begin;
    const int64_t row = sequence_.begin_q + tile.q.begin, rows = round_up(k.size(), 2);
    const BothWays<C> query =
        both_ways<C>(head_rows(p_.query, tile.head, row), tile, p_.head_dim, scratch_.query, kFewQueries);
    const BothWays<C> grad_out =
        both_ways<C>(head_rows(p_.grad_out, tile.head, row), tile, p_.head_dim_v, scratch_.grad_out, kFewGradients);
    load_logsumexp(p_, tile, scratch_.logsumexp);
    load_rows(shared_.delta + row_of(p_, sequence_, tile.head) + tile.q.begin, tile, scratch_.delta);

    const Matrix<T> weight{scratch_.weight, kQueries<T>}, grad_score{scratch_.grad_score, kQueries<T>};
    const int64_t next = row + tile.q.size(), unread = minimum(tile.q.size(), queries_.end - tile.q.end);
    multiply_queries<C>(rows_from(key_, skip), query.operand, tile, weight, rows, Start::kZero,
                        RowsAhead(head_rows(p_.query, tile.head, next), unread, p_.head_dim));
    multiply_queries<C>(rows_from(value_, skip), grad_out.operand, tile, grad_score, rows, Start::kZero,
                        RowsAhead(head_rows(p_.grad_out, tile.head, next), unread, p_.head_dim_v));
    const GradientOperands<C> operands = score_gradients(block, tile, weight, grad_score);

    const int64_t queries = ceil_div(tile.q.size(), C::kPair);
    const bool last = unread <= 0;
    const int64_t first_key = sequence_.begin_k + rows_.begin;
    if (p_.grad_value) {
      multiply<C>(by_rows(operands.weight_by_query), grad_out.lanes, queries, grad_value(k.begin), rows,
                  shape_.value_columns / kLanes<T>, Start::kAdd,
                  RowsAhead(head_rows(p_.grad_value, kv_head_, first_key), last ? rows_.size() : 0, p_.head_dim_v));
    }
    if (p_.grad_key) {
      multiply<C>(by_rows(operands.by_query), query.lanes, queries, grad_key(k.begin), rows, shape_.columns / kLanes<T>,
                  Start::kAdd, rows_after_grad_key(tile, k, grad_query, last));
    }
    if (p_.grad_query) {
      multiply<C>(by_columns(operands.by_key), rows_from(key_lanes_, skip / C::kPair), ceil_div(k.size(), C::kPair),
                  grad_query, round_up(tile.q.size(), 2), shape_.columns / kLanes<T>, Start::kAdd,
                  shape_.adds_queries
                      ? next_mask_rows(p_.attn_mask, tile, k)
                      : RowsAhead(head_rows(p_.grad_query, tile.head, row), tile.q.size(), p_.head_dim));
    }
  }

  // Rows of grad_key that a block's last tile finishes; otherwise the rows that this tile adds to next.
  RowsAhead rows_after_grad_key(const Tile& tile, Range k, Matrix<T> grad_query, bool last) const {
    if (last) {
      return {head_rows(p_.grad_key, kv_head_, sequence_.begin_k + rows_.begin), rows_.size(), p_.head_dim};
    }
    if (p_.grad_attn_mask) return next_mask_rows(p_.grad_attn_mask, tile, k);
    return {source_of(grad_query), shape_.adds_queries ? tile.q.size() : 0, shape_.columns};
  }

  // From dot products in `weight` and grad_out . value in `grad_score`.
  GradientOperands<C> score_gradients(const Block<T>& block, const Tile& tile, Matrix<T> weight, Matrix<T> grad_score) {
    const Range k = block.k;
    const Matrix<T> dot{p_.score_mod && p_.score_mod->gradient ? scratch_.dot : nullptr, kQueries<T>};
    if (p_.score_mod) {
      if (dot.data) copy_block(weight, dot, k.size(), tile.vectors);
      apply_score_mod(p_, tile, k, weight);
    }
    GradientOperands<C> operands;
    if (!dropout_.present && !p_.grad_attn_mask && !p_.grad_alibi_slopes && !dot.data) {
      with_constants(tile.vectors, block.mode, [&](auto vectors, auto mode) {
        operands = plain_gradient_operands<C, vectors, mode>(block, scratch_.logsumexp, scratch_.delta, weight,
                                                             grad_score, scratch_.pairs);
      });
      return operands;
    }
    const Matrix<T> softcap_grad{block.mods.is_nonlinear() ? scratch_.softcap_grad : nullptr, kQueries<T>};
    with_constants(tile.vectors, block.mode, [&](auto vectors, auto mode) {
      probability_block<C, vectors, mode>(block, weight, scratch_.logsumexp, softcap_grad);
    });
    score_gradient(dropout_, tile, k, weight, grad_score, scratch_.delta);
    if (p_.grad_attn_mask) add_to_mask_gradient(p_.grad_attn_mask, tile, k, as_operand(grad_score));
    if (p_.grad_alibi_slopes) {
      shared_.slope_sums.of(group_, sequence_, tile.head) +=
          slope_gradient(block, tile.vectors, as_operand(grad_score));
    }
    if (softcap_grad.data) multiply_elements(softcap_grad, grad_score, k.size(), tile.vectors);
    if (dot.data) score_mod_gradient(p_, tile, k, dot, grad_score, copy_);
    return gradient_operands<C>(weight, grad_score, k.size(), tile.vectors, scratch_.pairs);
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
  Matrix<T> grad_query_sums(const Tile& tile) const {
    return rows_from(shared_.query_sums.of(share_, group_, sequence_, tile.head), tile.q.begin - share_.queries.begin);
  }

  const BackwardProblem& p_;
  const BackwardShape<C>& shape_;
  const BackwardShared<C>& shared_;
  const BackwardScratch<C>& scratch_;
  Dropout dropout_;
  int64_t copy_;  // of the gradients of captured tensors
  Sequence sequence_{};
  int64_t group_ = 0, kv_head_ = 0;
  GroupShare share_{};
  Range queries_{};           // that see any of the block's keys, or all
  Range rows_{};              // the block's keys
  Range packed_kv_{};         // of them, those that any query sees, packed
  int64_t pair_padding_ = 0;  // rows before them that only complete a pair
  Matrix<const Element> key_, key_lanes_, value_;
};

template <class C>
Plan plan_backward(const AttentionProblem& problem) {
  const auto& p = static_cast<const BackwardProblem&>(problem);
  const BackwardShape<C> shape(p);
  const GradientJobs jobs = backward_jobs(p);
  Arena unplaced(nullptr), shared(nullptr), scratch(nullptr);
  const auto& sums = BackwardShared<C>(unplaced, p, shape, jobs).query_sums;
  BackwardShared<C>(shared, p, shape, jobs, sums.dealt() ? sums.deal() : 0);
  BackwardScratch<C>(scratch, p, shape);
  Plan plan;
  if (sums.dealt()) plan.phases[plan.phase_count++] = {1, deal_backward_queries<C>};
  plan.phases[plan.phase_count++] = {p.batch * p.heads, run_backward_rows<C>};
  add_delta_phase(p, plan);
  plan.phases[plan.phase_count++] = {sum_copies(p) == 0 ? jobs.count : sum_copies(p), BackwardBlocks<C>::run};
  plan.phases[plan.phase_count++] = {p.batch * p.heads, run_backward_queries<C>};
  plan.shared_bytes = shared.used();
  plan.scratch_bytes = maximum(plan.scratch_bytes, scratch.used());
  return plan;
}

}  // namespace
}  // namespace attention_ext
