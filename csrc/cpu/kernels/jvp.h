// Tangents of out and logsumexp (forward mode). With prob P, score tangent S' and m = rowsum(P S'):
//   logsumexp' = m (a sink's own tangent included),   out' = (P S') value + P value' - m out
// P is after dropout in out', before it in m. Double backward begins with the same pass.
#pragma once

#include "cpu/kernels/query_operand.h"
#include "cpu/kernels/query_runs.h"
#include "cpu/kernels/tangent.h"

namespace attention_ext {
namespace {

template <class C>
RunShape<C> jvp_shape(const AttentionProblem& p, int64_t most_tiles = kTilesPerJob) {
  return {p, 2 * p.head_dim + p.head_dim_v, most_tiles};
}

template <class C>
struct JvpScratch {
  using T = typename C::Scalar;
  using Element = typename C::Element;
  Element *query_rows, *query_columns, *query_tangent_columns, *key_rows, *key_tangent_rows;
  Element *value_rows, *value_lanes, *value_tangent_rows, *value_tangent_lanes, *weight_rows;
  T *sums, *kept_weight, *kept_tangent, *bias, *bias_tangent, *mean, *logsumexp;
  Tile* tiles;

  JvpScratch(Arena& arena, const JvpProblem& p, const RunShape<C>& shape) {
    const Tangents& tangent = p.tangent;
    const int64_t depth = round_up(shape.depth, kLanes<Element>), padded_keys = shape.keys + kTileRows;
    const int64_t block = padded_keys * kQueries<T>, values = padded_keys * shape.columns;
    const bool paired = C::kPair != 1;
    query_rows = arena.take<Element>(kQueries<T> * depth);
    query_columns = arena.take<Element>(shape.tiles_per_job * depth * kQueries<T>);
    query_tangent_columns = arena.take<Element>(tangent.query ? shape.tiles_per_job * depth * kQueries<T> : 0);
    key_rows = arena.take<Element>(padded_keys * depth);
    key_tangent_rows = arena.take<Element>(tangent.key ? padded_keys * depth : 0);
    value_rows = arena.take<Element>(values);
    value_lanes = arena.take<Element>(paired ? values : 0);
    value_tangent_rows = arena.take<Element>(tangent.value ? values : 0);
    value_tangent_lanes = arena.take<Element>(tangent.value && paired ? values : 0);
    weight_rows = arena.take<Element>(paired ? block : 0);
    sums = arena.take<T>(shape.tiles_per_job * kQueries<T> * shape.columns);
    kept_weight = arena.take<T>(block);
    kept_tangent = arena.take<T>(block);
    bias = arena.take<T>(p.has_tensor_mask() ? block : 0);
    bias_tangent = arena.take<T>(tangent.attn_mask ? block : 0);
    mean = arena.take<T>(shape.tiles_per_job * kQueries<T>);
    logsumexp = arena.take<T>(kLogsumexpNumbers<T>);
    tiles = arena.take<Tile>(shape.tiles_per_job);
  }
};

// Job packs keys and values, and computes the blocks and tiles it needs from them.
template <class C, class Job>
class JvpRun : protected QueryRun<C, Job> {
  using Run = QueryRun<C, Job>;
  using T = typename C::Scalar;
  using Element = typename C::Element;
  friend Run;

 protected:
  using Run::kv_head_, Run::packed_kv_, Run::sequence_, Run::shape_, Run::tiles_, Run::pair_padding_;

  JvpRun(const JvpProblem& p, const RunShape<C>& shape, const JvpScratch<C>& scratch)
      : Run(p, shape, scratch.tiles), p_(p), scratch_(scratch), dropout_(dropout_of(p)) {}

  void prologue(int64_t i) {
    const Tile& tile = tiles_[i];
    open_queries(p_.query, tile, queries(scratch_.query_columns, i, tile));
    if (p_.tangent.query) open_queries(p_.tangent.query, tile, queries(scratch_.query_tangent_columns, i, tile));
    clear_lanes(mean(i), kQueries<T>);
    clear_lanes(sums(i).data, kQueries<T> * shape_.columns);
  }

  // Operands of the scores.
  void pack_score_keys(Range k) {
    key_ = pack_rows(p_.key, k, p_.head_dim, scratch_.key_rows);
    if (p_.tangent.key) key_tangent_ = pack_rows(p_.tangent.key, k, p_.head_dim, scratch_.key_tangent_rows);
  }

  // Also adds the sums of P S' to `mean` (per lane), and fills `softcap_grads` if it has room.
  void make_scores(int64_t i, const Tile& tile, int64_t first_lane, const Block<T>& block, const Scores<T>& scores,
                   const SoftcapGrads<T>& softcap_grads, T* mean) {
    const Range k = block.k;
    const int64_t skip = k.begin - packed_kv_.begin;
    const int64_t keys = round_up(k.size(), 2);
    const auto query = queries(scratch_.query_columns, i, tile).from(first_lane);
    multiply_queries<C>(rows_from(key_, skip), query, tile, scores.weight, keys);
    if (p_.tangent.query) {
      const auto query_tangent = queries(scratch_.query_tangent_columns, i, tile).from(first_lane);
      multiply_queries<C>(rows_from(key_, skip), query_tangent, tile, scores.tangent, keys);
    }
    if (p_.tangent.key) {
      multiply_queries<C>(rows_from(key_tangent_, skip), query, tile, scores.tangent, keys,
                          p_.tangent.query ? Start::kAdd : Start::kZero);
    }
    if (!p_.tangent.query && !p_.tangent.key) clear_block(scores.tangent, k.size(), tile.vectors);
    load_logsumexp(p_, tile, scratch_.logsumexp);
    const auto score_tangent = score_tangent_of(p_, tile, k, Matrix<T>{scratch_.bias_tangent, kQueries<T>});
    with_constants(tile.vectors, block.mode, [&](auto vectors, auto mode) {
      scores_block<C, vectors, mode>(block, scratch_.logsumexp, score_tangent, scores, softcap_grads, mean);
    });
  }

  void pack_value_rows(Range k) {
    value_rows_ = pack_rows(p_.value, k, p_.head_dim_v, scratch_.value_rows);
    if (p_.tangent.value) {
      value_tangent_rows_ = pack_rows(p_.tangent.value, k, p_.head_dim_v, scratch_.value_tangent_rows);
    }
  }

  // Operands of out'.
  void pack_values(Range k) {
    pack_value_rows(k);
    value_ = lanes_of<C>(value_rows_, round_up(k.size(), 2), shape_.columns, scratch_.value_lanes);
    if (p_.tangent.value) {
      value_tangent_ =
          lanes_of<C>(value_tangent_rows_, round_up(k.size(), 2), shape_.columns, scratch_.value_tangent_lanes);
    }
  }

  void add_to_out(int64_t i, const Tile& tile, int64_t first_lane, Range k, Scores<T> scores) {
    const int64_t skip = k.begin - packed_kv_.begin;
    if (dropout_.present) scores = drop(scores, tile, k);
    const Matrix<T> sum = rows_from(sums(i), first_lane);
    add_product(scores.tangent, rows_from(value_, skip / C::kPair), k, tile, sum);
    if (p_.tangent.value) add_product(scores.weight, rows_from(value_tangent_, skip / C::kPair), k, tile, sum);
  }

  // Adds the sink to m, which is then complete: logsumexp'.
  void finish_mean(int64_t i) {
    const Tile& tile = tiles_[i];
    const int64_t row = row_of(p_, sequence_, tile.head) + tile.q.begin;
    T* logsumexp_tangent = static_cast<T*>(p_.logsumexp_tangent) + row;
    for (int64_t r = 0; r < tile.q.size(); ++r) {
      T& m = mean(i)[r];
      if (p_.tangent.sinks) {
        m += static_cast<T>(sink_prob<T>(p_, sequence_, tile.head, tile.q.begin + r) *
                            p_.tangent.sinks[sequence_.batch * p_.heads + tile.head]);
      }
      logsumexp_tangent[r] = m;
    }
  }

  // The sums become out'.
  void finish_out(int64_t i) {
    const Tile& tile = tiles_[i];
    const int64_t b = sequence_.tensor_batch, first = sequence_.begin_q + tile.q.begin;
    for (int64_t r = 0; r < tile.q.size(); ++r) {
      add_mean_part(source_of(p_.out, b, tile.head, first + r), -mean(i)[r], sums(i).row(r));
    }
    if (!p_.out_tangent) return;
    const T one = 1;
    write_rows(source_of(p_.out_tangent, b, tile.head, first), tile.q.size(), p_.head_dim_v, as_operand(sums(i)), &one,
               0);
  }

  Matrix<const Element> pack_rows(const View& view, Range k, int64_t width, Element* buffer) const {
    const Source source = source_of(view, sequence_.tensor_batch, kv_head_, sequence_.begin_k + k.begin);
    return rows_of<C>(source, k.size(), round_up(k.size(), 2), width, buffer, pair_padding_);
  }

  // The scores of a block that need not outlive it.
  Scores<T> passing_scores() const {
    return {{scratch_.kept_weight, kQueries<T>}, {scratch_.kept_tangent, kQueries<T>}};
  }
  Matrix<T> sums(int64_t i) const { return {scratch_.sums + i * kQueries<T> * shape_.columns, shape_.columns}; }
  T* mean(int64_t i) const { return scratch_.mean + i * kQueries<T>; }

  const JvpProblem& p_;
  const JvpScratch<C>& scratch_;
  Dropout dropout_;
  Matrix<const Element> key_, key_tangent_, value_rows_, value_tangent_rows_;

 private:
  void open_queries(const View& view, const Tile& tile, const QueryOperand<C>& to) {
    const Source source = source_of(view, sequence_.tensor_batch, tile.head, sequence_.begin_q + tile.q.begin);
    to.pack(tile_rows<C>(source, tile, p_.head_dim, scratch_.query_rows), tile);
  }

  Scores<T> drop(const Scores<T>& whole, const Tile& tile, Range k) const {
    const Scores<T> kept_scores = passing_scores();
    for_each_vector<T>(dropout_, tile, k, [&](int64_t r, int64_t lane, auto kept) __attribute__((always_inline)) {
      store(kept_scores.weight.row(r) + lane, kept ? load(whole.weight.row(r) + lane) : Vec<T>{});
      store(kept_scores.tangent.row(r) + lane, kept ? load(whole.tangent.row(r) + lane) : Vec<T>{});
    });
    return kept_scores;
  }

  void add_product(Matrix<T> weight, Matrix<const Element> value, Range k, const Tile& tile, Matrix<T> to) {
    if (shape_.columns == 0) return;
    const auto by_key = weights_by_keys<C>(weight, k.size(), tile.vectors, scratch_.weight_rows);
    multiply<C>(by_columns(by_key), value, ceil_div(k.size(), C::kPair), to, tile.vectors * kLanes<T>,
                shape_.columns / kLanes<T>, Start::kAdd);
  }

  // sums = kept_scale * sums + factor * out
  void add_mean_part(Source out, T factor, T* row_sums) const {
    with_storage<T>(out.dtype, [&](auto* storage) __attribute__((always_inline)) {
      const auto* from = reinterpret_cast<decltype(storage)>(const_cast<char*>(out.data));
      for_each_vector_of_row<T>(p_.head_dim_v, [&](int64_t d, auto count) __attribute__((always_inline)) {
        const Vec<T> o = load_strided<T>(from + d * out.stride_col, out.stride_col, count);
        store(row_sums + d,
              fma(o, splat<T>(factor), load(row_sums + d) * splat<T>(static_cast<T>(dropout_.kept_scale))));
      });
    });
  }

  QueryOperand<C> queries(Element* base, int64_t i, const Tile& tile) const {
    return {base + i * round_up(shape_.depth, kLanes<Element>) * kQueries<T>, tile, p_.head_dim};
  }

  Matrix<const Element> value_, value_tangent_;
};

template <class C>
class JvpJob : JvpRun<C, JvpJob<C>> {
  using Jvp = JvpRun<C, JvpJob<C>>;
  using T = typename C::Scalar;
  friend Jvp;
  friend QueryRun<C, JvpJob<C>>;

 public:
  static void run(const AttentionProblem& problem, void*, void* memory, int64_t job) {
    const auto& p = static_cast<const JvpProblem&>(problem);
    const RunShape<C> shape = jvp_shape<C>(p);
    Arena arena(memory);
    const JvpScratch<C> scratch(arena, p, shape);
    JvpJob(p, shape, scratch).mainloop(job);
  }

 private:
  using Jvp::Jvp;

  void pack_keys(Range k) {
    this->pack_score_keys(k);
    this->pack_values(k);
  }

  void tile_block(int64_t i, const Tile& tile, int64_t lane, Range keys) {
    const auto& memory = this->scratch_;
    Block<T> block;
    if (!make_block(this->p_, tile, keys, Matrix<T>{memory.bias, kQueries<T>}, block)) return;
    const Scores<T> scores = this->passing_scores();
    this->make_scores(i, tile, lane, block, scores, {}, this->mean(i) + lane);
    this->add_to_out(i, tile, lane, block.k, scores);
  }

  void epilogue(int64_t i) {
    this->finish_mean(i);
    this->finish_out(i);
  }
};

template <class C>
Plan plan_jvp(const AttentionProblem& problem) {
  const auto& p = static_cast<const JvpProblem&>(problem);
  const RunShape<C> shape = jvp_shape<C>(p);
  Arena measure(nullptr);
  JvpScratch<C>(measure, p, shape);
  Plan plan;
  plan.phases[plan.phase_count++] = {shape.jobs, JvpJob<C>::run};
  plan.scratch_bytes = measure.used();
  return plan;
}

}  // namespace
}  // namespace attention_ext
