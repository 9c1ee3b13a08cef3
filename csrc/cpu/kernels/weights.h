// The attention weights, for callers that ask for them: prob = exp(score - logsumexp), after dropout, in one pass over
// the keys; per head, or averaged over heads without a buffer per head.
#pragma once

#include "cpu/kernels/dropout.h"
#include "cpu/kernels/probability.h"
#include "cpu/kernels/query_operand.h"

namespace attention_ext {
namespace {

template <class C>
struct WeightsScratch {
  using T = typename C::Scalar;
  using Element = typename C::Element;
  Element *query_rows, *query_columns, *key_rows;
  T *weight, *mean, *bias, *logsumexp;

  WeightsScratch(Arena& arena, const AttentionProblem& p) {
    const int64_t depth = round_up(ceil_div(p.head_dim, C::kPair), kLanes<Element>);
    const int64_t padded_keys = kKeys + kTileRows;
    query_rows = arena.take<Element>(kQueries<T> * depth);
    query_columns = arena.take<Element>(depth * kQueries<T>);
    key_rows = arena.take<Element>(padded_keys * depth);
    weight = arena.take<T>(padded_keys * kQueries<T>);
    mean = arena.take<T>(padded_keys * kQueries<T>);
    bias = arena.take<T>(p.has_tensor_mask() ? kKeys * kQueries<T> : 0);
    logsumexp = arena.take<T>(kLogsumexpNumbers<T>);
  }
};

template <class C>
class WeightsJob {
  using T = typename C::Scalar;

 public:
  static int64_t tiles(const WeightsProblem& p) { return ceil_div(p.row_end - p.row_begin, kQueries<T>); }
  static int64_t head_runs(const WeightsProblem& p) { return p.average_heads ? 1 : p.heads; }

  static void run(const AttentionProblem& problem, void*, void* scratch, int64_t job) {
    const auto& p = static_cast<const WeightsProblem&>(problem);
    Arena arena(scratch);
    WeightsJob(p, arena).mainloop(job);
  }

 private:
  WeightsJob(const WeightsProblem& p, Arena& arena) : p_(p), scratch_(arena, p), dropout_(dropout_of(p)) {}

  void mainloop(int64_t job) {
    const int64_t group = job / tiles(p_), first = p_.row_begin + job % tiles(p_) * kQueries<T>;
    const int64_t head = group % head_runs(p_);
    const Sequence s = sequence_of(p_, group / head_runs(p_));
    const Range q{first, minimum(first + kQueries<T>, p_.row_end)};
    const Range heads = p_.average_heads ? Range{0, p_.heads} : Range{head, head + 1};
    for (int64_t k = 0; k < p_.seqlen_k; k += kKeys) {
      const Range keys{k, minimum(k + kKeys, p_.seqlen_k)};
      const Matrix<T> mean{scratch_.mean, kQueries<T>};
      clear_lanes(mean.data, kKeys * kQueries<T>);
      for (int64_t h = heads.begin; h < heads.end; ++h) {
        add_head({s, h, q, ceil_div(q.size(), kLanes<T>)}, keys, splat<T>(T(1) / static_cast<T>(heads.size())));
      }
      const Source to = source_of(p_.weights, s.batch, head, q.begin - p_.row_begin);
      write_transposed(columns_from(to, k), q.size(), keys.size(), as_operand(mean));
    }
  }

  void add_head(const Tile& tile, Range block_keys, Vec<T> share) {
    const Range seen = visible_keys(p_, tile.sequence, tile.q);
    for_each_run(p_, tile, {maximum(block_keys.begin, seen.begin), minimum(block_keys.end, seen.end)},
                 [&](Range keys) { add_run(tile, block_keys.begin, keys, share); });
  }

  // Into the columns of `mean` from first_key on.
  void add_run(const Tile& tile, int64_t first_key, Range keys, Vec<T> share) {
    Block<T> block;
    if (!make_block(p_, tile, keys, Matrix<T>{scratch_.bias, kQueries<T>}, block)) return;
    const Range k = block.k;
    const int64_t b = tile.sequence.batch, rows = round_up(k.size(), 2);
    const QueryOperand<C> query(scratch_.query_columns, tile, p_.head_dim);
    query.pack(tile_rows<C>(source_of(p_.query, b, tile.head, tile.q.begin), tile, p_.head_dim, scratch_.query_rows),
               tile);
    const auto key = rows_of<C>(source_of(p_.key, b, tile.head / p_.group_size(), k.begin), k.size(), rows, p_.head_dim,
                                scratch_.key_rows);
    const Matrix<T> weight{scratch_.weight, kQueries<T>};
    multiply_queries<C>(key, query, tile, weight, rows);

    load_logsumexp(p_, tile, scratch_.logsumexp);
    with_constants(tile.vectors, block.mode, [&](auto vectors, auto mode) {
      probability_block<C, vectors, mode>(block, weight, scratch_.logsumexp, {});
    });
    if (dropout_.present) {
      drop(dropout_, tile, k, weight);
      share *= splat<T>(static_cast<T>(dropout_.kept_scale));
    }
    for (int64_t r = 0; r < k.size(); ++r) {
      T* to = scratch_.mean + (k.begin - first_key + r) * kQueries<T>;
      for (int64_t lane = 0; lane < tile.vectors * kLanes<T>; lane += kLanes<T>) {
        store(to + lane, fma(load(weight.row(r) + lane), share, load(to + lane)));
      }
    }
  }

  static void write_transposed(Source to, int64_t queries, int64_t keys, Matrix<const T> from) {
    with_storage<T>(to.dtype, [&](auto* storage) __attribute__((always_inline)) {
      auto* data = reinterpret_cast<decltype(storage)>(const_cast<char*>(to.data));
      for (int64_t k = 0; k < keys; k += kLanes<T>) {
        for (int64_t q = 0; q < queries; q += kLanes<T>) {
          Vec<T> block[kLanes<T>];
          unroll<kLanes<T>>(UNROLLED(i) { block[i] = load(from.row(k + i) + q); });
          transpose(block);
          unroll<kLanes<T>>(UNROLLED(i) {
            if (q + i < queries) {
              store_strided<T>(data + (q + i) * to.stride_row + k * to.stride_col, to.stride_col, block[i], keys - k);
            }
          });
        }
      }
    });
  }

  const WeightsProblem& p_;
  WeightsScratch<C> scratch_;
  Dropout dropout_;
};

template <class C>
Plan plan_weights(const AttentionProblem& problem) {
  const auto& p = static_cast<const WeightsProblem&>(problem);
  Arena measure(nullptr);
  WeightsScratch<C>(measure, p);
  Plan plan;
  plan.phases[plan.phase_count++] = {p.batch * WeightsJob<C>::head_runs(p) * WeightsJob<C>::tiles(p),
                                     WeightsJob<C>::run};
  plan.scratch_bytes = measure.used();
  return plan;
}

}  // namespace
}  // namespace attention_ext
