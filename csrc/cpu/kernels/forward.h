// softmax(scores) value by online softmax over the blocks of a query run; the forward pass writes it as out, with
// logsumexp.
#pragma once

#include "cpu/kernels/dropout.h"
#include "cpu/kernels/query_operand.h"
#include "cpu/kernels/query_runs.h"
#include "cpu/kernels/score_mod.h"
#include "cpu/kernels/softmax.h"

namespace attention_ext {
namespace {

template <class C>
RunShape<C> forward_shape(const AttentionProblem& p) {
  return {p, p.head_dim + p.head_dim_v};
}

template <class C>
struct ForwardScratch {
  using T = typename C::Scalar;
  using Element = typename C::Element;
  Element *query_rows, *query_columns, *key_rows, *value_rows, *value_lanes, *weight;
  T *sums, *score, *bias, *factor;
  RowState<T> rows;  // of all tiles
  Tile* tiles;

  ForwardScratch(Arena& arena, const AttentionProblem& p, const RunShape<C>& shape) {
    const int64_t depth = round_up(shape.depth, kLanes<Element>), padded_keys = shape.keys + kTileRows;
    query_rows = arena.take<Element>(kQueries<T> * depth);
    query_columns = arena.take<Element>(shape.tiles_per_job * depth * kQueries<T>);
    key_rows = arena.take<Element>(padded_keys * depth);
    value_rows = arena.take<Element>(padded_keys * shape.columns);
    value_lanes = arena.take<Element>(C::kPair == 1 ? 0 : padded_keys * shape.columns);
    weight = arena.take<Element>(C::kPair == 1 ? 0 : padded_keys * kQueries<T>);
    sums = arena.take<T>(shape.tiles_per_job * kQueries<T> * shape.columns);
    score = arena.take<T>(padded_keys * kQueries<T>);
    bias = arena.take<T>(p.has_tensor_mask() ? padded_keys * kQueries<T> : 0);
    factor = arena.take<T>(kQueries<T>);
    rows.maximum = arena.take<T>(shape.tiles_per_job * kQueries<T>);
    rows.sum = arena.take<T>(shape.tiles_per_job * kQueries<T>);
    tiles = arena.take<Tile>(shape.tiles_per_job);
  }
};

// Job provides epilogue(i), with sums(i) and row_state(i) complete, and epilogue_rows(tile), the rows of a tensor
// that the epilogue reads or writes.
template <class C, class Job>
class SoftmaxRun : protected QueryRun<C, Job> {
  using Run = QueryRun<C, Job>;
  using T = typename C::Scalar;
  using Element = typename C::Element;
  friend Run;

 protected:
  using Run::kv_head_, Run::packed_kv_, Run::sequence_, Run::shape_, Run::tiles_, Run::pair_padding_;

  SoftmaxRun(const AttentionProblem& p, const RunShape<C>& shape, const ForwardScratch<C>& scratch)
      : Run(p, shape, scratch.tiles), p_(p), scratch_(scratch), dropout_(dropout_of(p)) {}

  RowState<T> row_state(int64_t i, int64_t lane = 0) const {
    return {scratch_.rows.maximum + i * kQueries<T> + lane, scratch_.rows.sum + i * kQueries<T> + lane};
  }
  Matrix<T> sums(int64_t i) const { return {scratch_.sums + i * kQueries<T> * shape_.columns, shape_.columns}; }

  // factor[q] turns the sums of query q into its output.
  void finish_sums(int64_t i) {
    for (int64_t lane = 0; lane < tiles_[i].q.size(); lane += kLanes<T>) {
      const Vec<T> sum = load(row_state(i).sum + lane);
      store(scratch_.factor + lane, one_over<T>(sum) * splat<T>(static_cast<T>(dropout_.kept_scale)));
    }
  }

  const AttentionProblem& p_;
  const ForwardScratch<C>& scratch_;
  Dropout dropout_;

 private:
  void prologue(int64_t i) {
    const Tile& tile = tiles_[i];
    const int64_t queries = tile.vectors * kLanes<T>;
    const Source source = source_of(p_.query, sequence_.tensor_batch, tile.head, sequence_.begin_q + tile.q.begin);
    query(i, tile).pack(tile_rows<C>(source, tile, p_.head_dim, scratch_.query_rows), tile);
    const double sink = p_.sinks ? p_.sinks[sequence_.batch * p_.sinks_stride_b + tile.head] : -__builtin_inf();
    for (int64_t lane = 0; lane < queries; lane += kLanes<T>) {
      store(row_state(i).maximum + lane, splat<T>(static_cast<T>(sink)));
      store(row_state(i).sum + lane, splat<T>(p_.sinks ? 1 : 0));
    }
    clear_lanes(sums(i).data, queries * shape_.columns);
  }

  void pack_keys(Range k) {
    const int64_t row = sequence_.begin_k + k.begin, b = sequence_.tensor_batch, padded = round_up(k.size(), 2);
    key_ = rows_of<C>(source_of(p_.key, b, kv_head_, row), k.size(), padded, p_.head_dim, scratch_.key_rows,
                      pair_padding_);
    const auto rows = rows_of<C>(source_of(p_.value, b, kv_head_, row), k.size(), padded, p_.head_dim_v,
                                 scratch_.value_rows, pair_padding_);
    value_ = lanes_of<C>(rows, padded, shape_.columns, scratch_.value_lanes);
  }

  void tile_block(int64_t i, const Tile& tile, int64_t lane, Range keys) {
    Block<T> block;
    if (!make_block(p_, tile, keys, Matrix<T>{scratch_.bias, kQueries<T>}, block)) return;
    const Range k = block.k;
    const int64_t skip = k.begin - packed_kv_.begin;
    const Matrix<T> score{scratch_.score, kQueries<T>};
    multiply_queries<C>(rows_from(key_, skip), query(i, tile).from(lane), tile, score, round_up(k.size(), 2),
                        Start::kZero, next_mask_rows(p_.attn_mask, tile, k));
    if (p_.score_mod) apply_score_mod(p_, tile, k, score);
    // Weights go straight into pairs, unless some must be dropped first.
    Matrix<Element> pairs{dropout_.present ? nullptr : scratch_.weight, kQueries<T>};
    with_constants(tile.vectors, block.mode, [&](auto vectors, auto mode) {
      softmax_block<C, vectors, mode>(block, score, row_state(i, lane), scratch_.factor, pairs);
    });
    if (shape_.columns == 0) return;
    const bool is_last = visible_keys(p_, sequence_, tile.q).end <= packed_kv_.end;
    if (dropout_.present) drop(dropout_, tile, k, score);
    const bool paired = C::kPair == 2 && pairs.data;
    const auto weight = paired ? as_operand(pairs) : weights_by_keys<C>(score, k.size(), tile.vectors, scratch_.weight);
    multiply<C>(by_columns(weight), rows_from(value_, skip / C::kPair), ceil_div(k.size(), C::kPair),
                rows_from(sums(i), lane), tile.vectors * kLanes<T>, shape_.columns / kLanes<T>, Start::kScaleAndAdd,
                is_last ? this->self().epilogue_rows(tile) : RowsAhead(), scratch_.factor);
  }

  QueryOperand<C> query(int64_t i, const Tile& tile) const {
    return {scratch_.query_columns + i * round_up(shape_.depth, kLanes<Element>) * kQueries<T>, tile, p_.head_dim};
  }

  Matrix<const Element> key_, value_;
};

template <class C>
class ForwardJob : SoftmaxRun<C, ForwardJob<C>> {
  using Softmax = SoftmaxRun<C, ForwardJob<C>>;
  using T = typename C::Scalar;
  friend QueryRun<C, ForwardJob<C>>;
  friend Softmax;

 public:
  static void run(const AttentionProblem& problem, void*, void* scratch, int64_t job) {
    const auto& p = static_cast<const ForwardProblem&>(problem);
    const RunShape<C> shape = forward_shape<C>(p);
    if (!p.serves(shape.batch_of(p, job))) return;
    Arena arena(scratch);
    const ForwardScratch<C> memory(arena, p, shape);
    ForwardJob(p, shape, memory).mainloop(job);
  }

 private:
  ForwardJob(const ForwardProblem& p, const RunShape<C>& shape, const ForwardScratch<C>& scratch)
      : Softmax(p, shape, scratch), p_(p) {}

  Source out_rows(const Tile& tile) const {
    const Sequence& s = this->sequence_;
    return source_of(p_.out, s.tensor_batch, tile.head, s.begin_q + tile.q.begin);
  }
  RowsAhead epilogue_rows(const Tile& tile) const { return {out_rows(tile), tile.q.size(), p_.head_dim_v}; }

  void epilogue(int64_t i) {
    const Tile& tile = this->tiles_[i];
    const Sequence& s = this->sequence_;
    const int64_t row = row_of(p_, s, tile.head) + tile.q.begin;
    T *logsumexp = static_cast<T*>(p_.logsumexp) + row, *low = static_cast<T*>(p_.logsumexp_low),
      *max_scores = static_cast<T*>(p_.max_scores);
    const RowState<T> state = this->row_state(i);
    for (int64_t lane = 0; lane < tile.q.size(); lane += kLanes<T>) {
      const Vec<T> maximum = load(state.maximum + lane), sum = load(state.sum + lane);
      const int64_t count = tile.q.size() - lane;
      store_first<T>(logsumexp + lane, logsumexp_of<T>(maximum, sum), count);
      if (low) store_first<T>(low + row + lane, logsumexp_low_of<T>(maximum, sum), count);
      if (max_scores) store_first<T>(max_scores + row + lane, maximum, count);
    }
    this->finish_sums(i);
    write_rows(out_rows(tile), tile.q.size(), p_.head_dim_v, as_operand(this->sums(i)), this->scratch_.factor);
  }

  const ForwardProblem& p_;
};

template <class C>
Plan plan_forward(const AttentionProblem& p) {
  const RunShape<C> shape = forward_shape<C>(p);
  Arena measure(nullptr);
  ForwardScratch<C>(measure, p, shape);
  Plan plan;
  plan.phases[plan.phase_count++] = {shape.jobs, ForwardJob<C>::run};
  plan.scratch_bytes = measure.used();
  return plan;
}

}  // namespace
}  // namespace attention_ext
