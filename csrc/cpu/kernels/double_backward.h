// The gradients of attention_backward's results, in phases. With prob P, dP = dropout(grad_out value^T),
// D = delta, and ' for a tangent (jvp.h has S', m and out'):
//   rows     delta (and its finer form), as in the backward pass
//   tiles    first P and P S', with them m = logsumexp', and either out' and D' = rowsum(grad_out out'), or dP, dP' and
//            D' = rowsum(P' dP + P dP') where out' is not wanted, which saves two of twelve products; then
//            P' = P (S' - m),  dS = P (dP - D),  dS' = P' (dP - D) + P (dP' - D');
//            through the nonlinear score_mod f: dU = dS f',  dU' = dS' f' + dS f'' U';  then
//            grad_query = scale (dU' key + dU key'),  grad_key = scale (dU'^T query + dU^T query'),
//            grad_value = dropout(P')^T grad_out,  grad_attn_mask = dS'
//   keys     the groups' sums become grad_key, grad_value and the gradients of slopes and sinks
// A job of the tiles finishes queries, one tile after another. The second part needs m and D' of whole rows, and the
// blocks of the first: a tile holds them for as many keys as fit its caches, and computes those beyond a second time.
#pragma once

#include "cpu/kernels/double_backward_keys.h"
#include "cpu/kernels/gradient.h"

namespace attention_ext {
namespace {

template <class C>
class DoubleBackwardTiles : JvpRun<C, DoubleBackwardTiles<C>> {
  using Jvp = JvpRun<C, DoubleBackwardTiles<C>>;
  using T = typename C::Scalar;
  using Element = typename C::Element;
  friend Jvp;
  friend QueryRun<C, DoubleBackwardTiles<C>>;

 public:
  static RunShape<C> run_shape(const AttentionProblem& p) { return jvp_shape<C>(p, /*most_tiles=*/1); }

  static void run(const AttentionProblem& problem, void* shared_memory, void* scratch_memory, int64_t job) {
    const auto& p = static_cast<const DoubleBackwardProblem&>(problem);
    const RunShape<C> run = run_shape(p);
    const BackwardShape<C> shape(p);
    const GradientJobs jobs = double_backward_jobs(p);
    Arena shared_arena(shared_memory), scratch_arena(scratch_memory);
    const DoubleBackwardShared<C> shared(shared_arena, p, shape, jobs.groups);
    const DoubleBackwardScratch<C> scratch(scratch_arena, p, run, shape);
    DoubleBackwardTiles(p, run, shape, shared, scratch).run_group(jobs, job);
  }

 private:
  using Jvp::dropout_, Jvp::key_, Jvp::key_tangent_, Jvp::kv_head_, Jvp::packed_kv_, Jvp::p_, Jvp::visible_,
      Jvp::sequence_, Jvp::tiles_, Jvp::pair_padding_, Jvp::value_rows_, Jvp::value_tangent_rows_;

  DoubleBackwardTiles(const DoubleBackwardProblem& p, const RunShape<C>& run, const BackwardShape<C>& shape,
                      const DoubleBackwardShared<C>& shared, const DoubleBackwardScratch<C>& scratch)
      : Jvp(p, run, scratch), gradient_shape_(shape), shared_(shared), memory_(scratch) {}

  void run_group(const GradientJobs& jobs, int64_t job) {
    group_ = jobs.group_of(job);
    const Range b = jobs.batches_of(job), h = jobs.kv_heads_of(job);
    for (int64_t batch = b.begin; batch < b.end; ++batch) {
      const Sequence s = sequence_of(p_, batch);
      const int64_t groups = jobs.groups_for(s.length_q);
      const int64_t tiles = ceil_div(s.length_q, kQueries<T>) * p_.group_size();  // runs of one tile
      held_ = memory_.held(s.length_k);
      for (int64_t head = h.begin; head < h.end; ++head) {
        shared_.clear(p_, group_, s, head);
        for (int64_t tile = group_; tile < tiles && group_ < groups; tile += groups) {
          this->mainloop(batch, head, tiles - 1 - tile);
        }
      }
    }
  }

  // The derivatives of a nonlinear score_mod would have to be held too.
  bool scores_held() const { return packed_kv_.end - first_key() <= held_.keys && !score_mods_of(p_).is_nonlinear(); }
  int64_t first_key() const { return visible_.begin / kKeys * kKeys; }

  // Where the matrices of some keys lie between the two parts.
  Scores<T> scores(Range k, int64_t lane) const {
    if (!scores_held()) return this->passing_scores();
    return {held(held_.scores.weight, k, lane), held(held_.scores.tangent, k, lane)};
  }
  Gradients<T> gradients(Range k, int64_t lane) const {
    if (held_.makes_out) return memory_.grad_score;
    return {held(held_.gradients.grad, k, lane), held(held_.gradients.tangent, k, lane)};
  }
  Matrix<T> held(Matrix<T> m, Range k, int64_t lane) const {
    return columns_from(rows_from(m, k.begin - first_key()), lane);
  }

  void prologue(int64_t i) {
    Jvp::prologue(i);
    pack_rows_of(tiles_[i]);
  }

  void pack_keys(Range k) {
    this->pack_score_keys(k);
    held_.makes_out ? this->pack_values(k) : this->pack_value_rows(k);
  }

  // The first part.
  void tile_block(int64_t i, const Tile& tile, int64_t lane, Range keys) {
    Block<T> block;
    if (!make_block(p_, tile, keys, Matrix<T>{memory_.bias, kQueries<T>}, block)) return;
    const Scores<T> scores = this->scores(block.k, lane);
    this->make_scores(i, tile, lane, block, scores, {}, this->mean(i) + lane);
    if (held_.makes_out) {
      this->add_to_out(i, tile, lane, block.k, scores);
    } else {
      const Gradients<T> gradients = this->gradients(block.k, lane);
      multiply_values(tile, lane, block.k, gradients);
      add_to_delta_tangent(dropout_, tile, block.k, scores, gradients, memory_.rows.from(lane));
    }
  }

  void epilogue(int64_t i) {
    const Tile& tile = tiles_[i];
    T* delta_tangent = shared_.delta_tangent + row_of(p_, sequence_, tile.head) + tile.q.begin;
    this->finish_mean(i);
    if (held_.makes_out) {
      this->finish_out(i);
      dot_rows(source_of(this->sums(i)), query_rows(p_.grad_out, tile), tile.q.size(), p_.head_dim_v, delta_tangent);
    } else {
      finish_delta_tangent(p_, tile, this->mean(i), memory_.rows, delta_tangent);
    }
    load_rows(this->mean(i), tile, memory_.rows.mean);
    load_rows(delta_tangent, tile, memory_.rows.delta_tangent);
    finish_tile(tile);
  }

  // The second part: once more over the keys, now that the sums of whole rows are known.
  void finish_tile(const Tile& tile) {
    clear_lanes(memory_.grad_query.data, kQueries<T> * gradient_shape_.columns);
    this->for_each_block(
        [this](Range k) { pack_gradient_keys(k); },
        [this](int64_t, const Tile& part, int64_t lane, Range keys) { gradient_block(part, lane, keys); });
    if (!p_.grad_query) return;
    const auto scale = static_cast<T>(p_.scale);
    write_rows(query_rows(p_.grad_query, tile), tile.q.size(), p_.head_dim, as_operand(memory_.grad_query), &scale, 0);
  }

  Source query_rows(const View& view, const Tile& tile) const {
    return source_of(view, sequence_.tensor_batch, tile.head, sequence_.begin_q + tile.q.begin);
  }

  // The tile's queries as the gradients' products read them, and its numbers per row.
  void pack_rows_of(const Tile& tile) {
    const int64_t queries = tile.vectors * kLanes<T>, row = row_of(p_, sequence_, tile.head) + tile.q.begin;
    const auto lanes = [&](const View& view, Element* rows, Element* pairs) {
      return lanes_of<C>(tile_rows<C>(query_rows(view, tile), tile, p_.head_dim, rows), queries,
                         gradient_shape_.columns, pairs);
    };
    query_lanes_ = lanes(p_.query, memory_.query_rows, memory_.query_lanes);
    if (p_.tangent.query) {
      query_tangent_lanes_ = lanes(p_.tangent.query, memory_.query_tangent_rows, memory_.query_tangent_lanes);
    }
    grad_out_ = both_ways<C>(query_rows(p_.grad_out, tile), tile, p_.head_dim_v, memory_.grad_out, kFewGradients);
    load_rows(shared_.delta + row, tile, memory_.rows.delta);
    clear_lanes(memory_.rows.delta_tangent, kQueries<T>);
    clear_lanes(memory_.rows.centred, kQueries<T>);
  }

  void pack_gradient_keys(Range k) {
    const int64_t padded = round_up(k.size(), 2);
    this->pack_score_keys(k);
    key_lanes_ = lanes_of<C>(key_, padded, gradient_shape_.columns, memory_.key_lanes);
    if (p_.tangent.key) {
      key_tangent_lanes_ = lanes_of<C>(key_tangent_, padded, gradient_shape_.columns, memory_.key_tangent_lanes);
    }
    if (held_.makes_out) this->pack_value_rows(k);
  }

  void gradient_block(const Tile& tile, int64_t lane, Range keys) {
    Block<T> block;
    if (!make_block(p_, tile, keys, Matrix<T>{memory_.bias, kQueries<T>}, block)) return;
    const Range k = block.k;
    const int64_t skip = k.begin - packed_kv_.begin;
    const Scores<T> scores = this->scores(k, lane);
    const Gradients<T> gradients = this->gradients(k, lane), &grad_score = memory_.grad_score;
    if (!scores_held()) {
      alignas(64) T mean[kQueries<T>] = {};
      this->make_scores(0, tile, lane, block, scores, memory_.softcap_grads, mean);
    }
    if (held_.makes_out) multiply_values(tile, lane, k, gradients);
    score_gradient_tangents(dropout_, tile, k, scores, gradients, memory_.rows.from(lane), memory_.weight_tangent,
                            grad_score);
    if (p_.grad_attn_mask) add_to_mask_gradient(p_.grad_attn_mask, tile, k, as_operand(grad_score.tangent));
    if (p_.grad_alibi_slopes) {
      shared_.slope_sums.of(group_, sequence_, tile.head) +=
          slope_gradient(block, tile.vectors, as_operand(grad_score.tangent));
    }
    if (block.mods.is_nonlinear()) apply_softcap_grad(memory_.softcap_grads, k.size(), tile.vectors, grad_score);
    for (const Matrix<T>& m : {memory_.weight_tangent, grad_score.grad, grad_score.tangent}) {
      clear_spare_row(m, k.size(), tile.vectors);
    }
    multiply_gradients(tile, lane, k, skip);
  }

  // grad_out value^T and grad_out value'^T
  void multiply_values(const Tile& tile, int64_t lane, Range k, const Gradients<T>& to) const {
    const auto times = [&](Matrix<const Element> value, Matrix<T> product) {
      multiply_queries<C>(rows_from(value, k.begin - packed_kv_.begin), grad_out_.operand.from(lane), tile, product,
                          round_up(k.size(), 2));
    };
    times(value_rows_, to.grad);
    if (p_.tangent.value) {
      times(value_tangent_rows_, to.tangent);
    } else {
      clear_block(to.tangent, k.size(), tile.vectors);
    }
  }

  void multiply_gradients(const Tile& tile, int64_t lane, Range k, int64_t skip) {
    const int64_t rows = round_up(k.size(), 2), queries = ceil_div(tile.q.size(), C::kPair);
    const auto to_keys = [&](Matrix<T> from, Matrix<const Element> lanes, const GroupSums<T>& sums) {
      const auto by_query = weights_by_queries<C>(from, rows, tile.vectors, memory_.weight_rows);
      const Matrix<T> to = rows_from(sums.of(group_, sequence_, kv_head_, sequence_.begin_k), k.begin);
      multiply<C>(by_rows(by_query), rows_from(lanes, lane / C::kPair), queries, to, rows, sums.columns / kLanes<T>,
                  Start::kAdd);
    };
    const auto to_queries = [&](Matrix<T> from, Matrix<const Element> lanes) {
      const auto by_key = weights_by_keys<C>(from, k.size(), tile.vectors, memory_.weight_rows);
      multiply<C>(by_columns(by_key), rows_from(lanes, skip / C::kPair), ceil_div(k.size(), C::kPair),
                  rows_from(memory_.grad_query, lane), round_up(tile.q.size(), 2), gradient_shape_.columns / kLanes<T>,
                  Start::kAdd);
    };
    if (p_.grad_value) to_keys(memory_.weight_tangent, grad_out_.lanes, shared_.value_sums);
    if (p_.grad_key) {
      to_keys(memory_.grad_score.tangent, query_lanes_, shared_.key_sums);
      if (p_.tangent.query) to_keys(memory_.grad_score.grad, query_tangent_lanes_, shared_.key_sums);
    }
    if (p_.grad_query) {
      to_queries(memory_.grad_score.tangent, key_lanes_);
      if (p_.tangent.key) to_queries(memory_.grad_score.grad, key_tangent_lanes_);
    }
  }

  const BackwardShape<C>& gradient_shape_;
  const DoubleBackwardShared<C>& shared_;
  const DoubleBackwardScratch<C>& memory_;
  int64_t group_ = 0;
  HeldBlocks<T> held_{};
  Matrix<const Element> key_lanes_, key_tangent_lanes_;
  Matrix<const Element> query_lanes_, query_tangent_lanes_;
  BothWays<C> grad_out_;
};

template <class C>
Plan plan_double_backward(const AttentionProblem& problem) {
  const auto& p = static_cast<const DoubleBackwardProblem&>(problem);
  const BackwardShape<C> shape(p);
  const GradientJobs jobs = double_backward_jobs(p);
  Arena shared(nullptr), scratch(nullptr);
  DoubleBackwardShared<C>(shared, p, shape, jobs.groups);
  DoubleBackwardScratch<C>(scratch, p, DoubleBackwardTiles<C>::run_shape(p), shape);
  Plan plan;
  plan.phases[plan.phase_count++] = {p.batch * p.heads, run_double_backward_rows<C>};
  add_delta_phase(p, plan);
  plan.phases[plan.phase_count++] = {jobs.count, DoubleBackwardTiles<C>::run};
  plan.phases[plan.phase_count++] = {p.batch * p.kv_heads, run_double_backward_keys<C>};
  plan.shared_bytes = shared.used();
  plan.scratch_bytes = maximum(plan.scratch_bytes, scratch.used());
  return plan;
}

}  // namespace
}  // namespace attention_ext
