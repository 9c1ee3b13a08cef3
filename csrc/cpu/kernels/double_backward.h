// The gradients of attention_backward's results, in phases. With prob P, dP = dropout(grad_out value^T),
// D = delta, and ' for what moves along the tangents (jvp.h has S', m and out'):
//   rows     delta (and its finer form), and the sums of grad_query become 0, as in the backward pass
//   jvp      out' and logsumexp' = m: the gradients with respect to grad_out and grad_logsumexp; then D'
//   blocks   P' = P (S' - m),  dS = P (dP - D),  dS' = P' (dP - D) + P (dP' - D'),  D' = rowsum(grad_out out');
//            through the softcap f: dU = dS f',  dU' = dS' f' + dS f'' U';  then
//            grad_query = scale (dU' key + dU key'),  grad_key = scale (dU'^T query + dU^T query'),
//            grad_value = dropout(P')^T grad_out,  grad_attn_mask = dS'
//   queries  what was summed apart becomes grad_query and the gradients of slopes and sinks
#pragma once

#include "cpu/kernels/backward.h"
#include "cpu/kernels/jvp.h"

namespace attention_ext {
namespace {

template <class C>
struct DoubleBackwardShared : BackwardShared<C> {
  using T = typename C::Scalar;
  T* delta_tangent;  // (b, h, q)

  DoubleBackwardShared(Arena& arena, const BackwardProblem& p, const BackwardShape<C>& shape)
      : BackwardShared<C>(arena, p, shape) {
    delta_tangent = arena.take<T>((p.cu_seqlens_q ? 1 : p.batch) * p.heads * p.seqlen_q);
  }
};

template <class C>
struct DoubleBackwardScratch : BackwardScratch<C> {
  using T = typename C::Scalar;
  using Element = typename C::Element;
  Element *key_tangent_rows, *key_tangent_lanes, *value_tangent_rows;
  T *moved, *grad_moved, *curve, *bias_tangent, *mean, *delta_tangent;
  BothWaysMemory<C> query_tangent;

  DoubleBackwardScratch(Arena& arena, const DoubleBackwardProblem& p, const BackwardShape<C>& shape)
      : BackwardScratch<C>(arena, p, shape), query_tangent(arena, p.tangent.query ? p.head_dim : 0) {
    const int64_t padded_keys = shape.keys + kTileRows, block = padded_keys * kQueries<T>;
    const int64_t depth = round_up(shape.depth, kLanes<Element>),
                  value_depth = round_up(shape.value_depth, kLanes<Element>);
    key_tangent_rows = arena.take<Element>(p.tangent.key ? padded_keys * depth : 0);
    key_tangent_lanes = arena.take<Element>(p.tangent.key && C::kPair != 1 ? padded_keys * shape.columns : 0);
    value_tangent_rows = arena.take<Element>(p.tangent.value ? padded_keys * value_depth : 0);
    moved = arena.take<T>(block);
    grad_moved = arena.take<T>(block);
    curve = arena.take<T>(p.softcap > 0 ? block : 0);
    bias_tangent = arena.take<T>(p.tangent.attn_mask ? block : 0);
    mean = arena.take<T>(kQueries<T>);
    delta_tangent = arena.take<T>(kQueries<T>);
  }
};

template <class C>
class DoubleBackwardBlocks : KeyBlocks<C, DoubleBackwardBlocks<C>, DoubleBackwardProblem, DoubleBackwardScratch<C>> {
  using Blocks = KeyBlocks<C, DoubleBackwardBlocks<C>, DoubleBackwardProblem, DoubleBackwardScratch<C>>;
  using T = typename C::Scalar;
  using Element = typename C::Element;
  friend Blocks;

 public:
  static void run(const AttentionProblem& problem, void* shared_memory, void* scratch_memory, int64_t job) {
    const auto& p = static_cast<const DoubleBackwardProblem&>(problem);
    const BackwardShape<C> shape(p);
    Arena shared_arena(shared_memory), scratch_arena(scratch_memory);
    const DoubleBackwardShared<C> shared(shared_arena, p, shape);
    const DoubleBackwardScratch<C> scratch(scratch_arena, p, shape);
    DoubleBackwardBlocks(p, shape, shared, scratch).walk(job);
  }

 private:
  using Blocks::dropout_, Blocks::kv_head_, Blocks::opened_, Blocks::p_, Blocks::scratch_, Blocks::sequence_,
      Blocks::shape_, Blocks::shared_, Blocks::unseen_;

  DoubleBackwardBlocks(const DoubleBackwardProblem& p, const BackwardShape<C>& shape,
                       const DoubleBackwardShared<C>& shared, const DoubleBackwardScratch<C>& scratch)
      : Blocks(p, shape, shared, scratch), delta_tangent_(shared.delta_tangent) {}

  void open_keys(Range k) {
    const int64_t row = sequence_.begin_k + k.begin, padded = round_up(k.size(), 2);
    const auto open = [&](const View& view, int64_t width, Element* buffer) {
      return rows_of<C>(this->head_rows(view, kv_head_, row), k.size(), padded, width, buffer, unseen_);
    };
    key_ = open(p_.key, p_.head_dim, scratch_.key_rows);
    key_lanes_ = lanes_of<C>(key_, padded, shape_.columns, scratch_.key_lanes);
    value_ = open(p_.value, p_.head_dim_v, scratch_.value_rows);
    if (p_.tangent.key) {
      key_tangent_ = open(p_.tangent.key, p_.head_dim, scratch_.key_tangent_rows);
      key_tangent_lanes_ = lanes_of<C>(key_tangent_, padded, shape_.columns, scratch_.key_tangent_lanes);
    }
    if (p_.tangent.value) value_tangent_ = open(p_.tangent.value, p_.head_dim_v, scratch_.value_tangent_rows);
  }

  void tile_block(const Tile& tile, Range keys) {
    Block<T> block;
    if (!open_block(p_, tile, keys, Matrix<T>{scratch_.bias, kQueries<T>}, block)) return;
    const Range k = block.k;
    const int64_t skip = k.begin - opened_.begin;
    open_queries(tile);
    multiply_scores(tile, k, skip);
    const Derivatives<T> bend = bend_of<T>(block, scratch_.slope, scratch_.curve);
    with_constants(tile.vectors, block.rules, [&](auto vectors, auto rules) {
      probability_block<C, vectors, rules>(block, weight(), scratch_.logsumexp, bend);
    });
    differentiate(block, bend, tile, k);
    if (p_.grad_attn_mask) add_to_mask_gradient(p_.grad_attn_mask, tile, k, as_operand(grad_moved()));
    if (p_.grad_alibi_slopes) {
      this->add_to_slope_gradient(tile, slope_gradient(block, tile.vectors, as_operand(grad_moved())));
    }
    if (bend.slope.data) unbend(bend, tile, k);
    for (const Matrix<T>& m : {weight(), grad_score(), grad_moved()}) clear_spare_row(m, k.size(), tile.vectors);
    multiply_gradients(tile, k, skip);
  }

  void open_queries(const Tile& tile) {
    const int64_t row = sequence_.begin_q + tile.q.begin, at = row_of(p_, sequence_, tile.head) + tile.q.begin;
    query_ = both_ways<C>(this->head_rows(p_.query, tile.head, row), tile, p_.head_dim, scratch_.query);
    grad_out_ = both_ways<C>(this->head_rows(p_.grad_out, tile.head, row), tile, p_.head_dim_v, scratch_.grad_out);
    if (p_.tangent.query) {
      query_tangent_ =
          both_ways<C>(this->head_rows(p_.tangent.query, tile.head, row), tile, p_.head_dim, scratch_.query_tangent);
    }
    load_logsumexp(static_cast<const T*>(p_.logsumexp) + at, tile, scratch_.logsumexp);
    load_rows(shared_.delta + at, tile, scratch_.delta);
    load_rows(static_cast<const T*>(p_.logsumexp_tangent) + at, tile, scratch_.mean);
    load_rows(delta_tangent_ + at, tile, scratch_.delta_tangent);
  }

  void multiply_scores(const Tile& tile, Range k, int64_t skip) {
    const auto product = [&](Matrix<const Element> a, Matrix<const Element> b, int64_t depth, Matrix<T> to,
                             Start start) {
      multiply<C>(by_rows(rows_from(a, skip)), b, depth, to, round_up(k.size(), 2), tile.vectors, start);
    };
    product(key_, query_.columns, shape_.depth, weight(), Start::kZero);
    product(value_, grad_out_.columns, shape_.value_depth, grad_score(), Start::kZero);
    if (p_.tangent.query) product(key_, query_tangent_.columns, shape_.depth, moved(), Start::kZero);
    if (p_.tangent.key) {
      product(key_tangent_, query_.columns, shape_.depth, moved(), p_.tangent.query ? Start::kAdd : Start::kZero);
    }
    if (!p_.tangent.query && !p_.tangent.key) clear_block(moved(), k.size(), tile.vectors);
    if (p_.tangent.value) {
      product(value_tangent_, grad_out_.columns, shape_.value_depth, grad_moved(), Start::kZero);
    } else {
      clear_block(grad_moved(), k.size(), tile.vectors);
    }
  }

  // weight, grad_score, grad_moved: P, grad_out value^T, grad_out value'^T become dropout(P'), dS, dS'.
  void differentiate(const Block<T>& block, const Derivatives<T>& bend, const Tile& tile, Range k) {
    const auto score_tangent = score_tangent_of(p_, p_.tangent, tile, k, Matrix<T>{scratch_.bias_tangent, kQueries<T>});
    const Vec<T> kept_scale = splat<T>(static_cast<T>(dropout_.kept_scale)), zero{};
    for_each_vector<T>(p_, dropout_, tile, k, [&](int64_t r, int64_t lane, auto kept) __attribute__((always_inline)) {
      T *w = weight().row(r) + lane, *g = grad_score().row(r) + lane, *gm = grad_moved().row(r) + lane;
      const Vec<T> prob = load(w);
      const Vec<T> shift =
          score_tangent(block, bend, load(moved().row(r) + lane), r, lane) - load(scratch_.mean + lane);
      const Vec<T> prob_tangent = prob * shift;
      const Vec<T> centred = (kept ? load(g) * kept_scale : zero) - load(scratch_.delta + lane);
      const Vec<T> centred_tangent = (kept ? load(gm) * kept_scale : zero) - load(scratch_.delta_tangent + lane);
      const Vec<T> second = fma(prob_tangent, centred, prob * centred_tangent);
      const auto hidden = prob == zero;
      store(w, hidden ? zero : (kept ? prob_tangent : zero));
      store(g, hidden ? zero : prob * centred);
      store(gm, hidden ? zero : second);
    });
  }

  // dS, dS' become dU, dU'.
  void unbend(const Derivatives<T>& bend, const Tile& tile, Range k) {
    const Vec<T> scale = splat<T>(static_cast<T>(p_.scale));
    for (int64_t r = 0; r < k.size(); ++r) {
      for (int64_t lane = 0; lane < tile.vectors * kLanes<T>; lane += kLanes<T>) {
        T *g = grad_score().row(r) + lane, *gm = grad_moved().row(r) + lane;
        const Vec<T> slope = load(bend.slope.row(r) + lane), curve = load(bend.curve.row(r) + lane);
        const Vec<T> dot_tangent = load(moved().row(r) + lane) * scale;
        store(gm, load(gm) * slope + load(g) * curve * dot_tangent);
        store(g, load(g) * slope);
      }
    }
  }

  void multiply_gradients(const Tile& tile, Range k, int64_t skip) {
    const int64_t rows = round_up(k.size(), 2), queries = ceil_div(tile.q.size(), C::kPair);
    const auto to_keys = [&](Matrix<T> from, Matrix<const Element> lanes, Matrix<T> to, int64_t columns) {
      const auto by_query = weights_by_queries<C>(from, rows, tile.vectors, scratch_.weight_rows);
      multiply<C>(by_rows(by_query), lanes, queries, to, rows, columns / kLanes<T>, Start::kAdd);
    };
    const auto to_queries = [&](Matrix<T> from, Matrix<const Element> lanes) {
      const auto by_key = weights_by_keys<C>(from, k.size(), tile.vectors, scratch_.weight_rows);
      multiply<C>(by_columns(by_key), rows_from(lanes, skip / C::kPair), ceil_div(k.size(), C::kPair),
                  this->grad_query(tile), round_up(tile.q.size(), 2), shape_.columns / kLanes<T>, Start::kAdd);
    };
    if (p_.grad_value) to_keys(weight(), grad_out_.lanes, this->grad_value(k.begin), shape_.value_columns);
    if (p_.grad_key) {
      to_keys(grad_moved(), query_.lanes, this->grad_key(k.begin), shape_.columns);
      if (p_.tangent.query) to_keys(grad_score(), query_tangent_.lanes, this->grad_key(k.begin), shape_.columns);
    }
    if (p_.grad_query) {
      to_queries(grad_moved(), key_lanes_);
      if (p_.tangent.key) to_queries(grad_score(), key_tangent_lanes_);
    }
  }

  Matrix<T> weight() const { return {scratch_.weight, kQueries<T>}; }
  Matrix<T> grad_score() const { return {scratch_.grad_score, kQueries<T>}; }
  Matrix<T> moved() const { return {scratch_.moved, kQueries<T>}; }
  Matrix<T> grad_moved() const { return {scratch_.grad_moved, kQueries<T>}; }

  const T* delta_tangent_;
  Matrix<const Element> key_, key_lanes_, key_tangent_, key_tangent_lanes_, value_, value_tangent_;
  BothWays<C> query_, query_tangent_, grad_out_;
};

// After the jvp phase: D' = rowsum(grad_out * out').
template <class C>
void run_delta_tangent(const AttentionProblem& problem, void* shared_memory, void*, int64_t job) {
  using T = typename C::Scalar;
  const auto& p = static_cast<const DoubleBackwardProblem&>(problem);
  const BackwardShape<C> shape(p);
  Arena arena(shared_memory);
  const DoubleBackwardShared<C> shared(arena, p, shape);
  const int64_t head = job % p.heads;
  const Sequence s = sequence_of(p, job / p.heads);
  T* delta_tangent = shared.delta_tangent + row_of(p, s, head);
  for (int64_t q = 0; q < s.length_q; ++q) {
    delta_tangent[q] = p.head_dim_v == 0
                           ? T(0)
                           : dot_rows<T>(source_of(p.out_tangent, s.tensor_batch, head, s.begin_q + q),
                                         source_of(p.grad_out, s.tensor_batch, head, s.begin_q + q), p.head_dim_v);
  }
}

template <class C>
void run_double_backward_queries(const AttentionProblem& problem, void* shared_memory, void*, int64_t job) {
  using T = typename C::Scalar;
  const auto& p = static_cast<const DoubleBackwardProblem&>(problem);
  const BackwardShape<C> shape(p);
  Arena arena(shared_memory);
  const DoubleBackwardShared<C> shared(arena, p, shape);
  const int64_t head = job % p.heads;
  const Sequence s = sequence_of(p, job / p.heads);
  finish_queries<C>(p, shape, shared, s, head);
  if (!p.grad_sinks) return;
  const int64_t row = row_of(p, s, head);
  const auto* mean = static_cast<const T*>(p.logsumexp_tangent) + row;
  const double moved = p.tangent.sinks ? p.tangent.sinks[s.batch * p.heads + head] : 0.0;
  p.grad_sinks[s.batch * p.heads + head] = sum_over_sink<T>(p, s, head, [&](int64_t q) {
    return (static_cast<double>(mean[q]) - moved) * static_cast<double>(shared.delta[row + q]) -
           static_cast<double>(shared.delta_tangent[row + q]);
  });
}

template <class C>
Plan plan_double_backward(const AttentionProblem& problem) {
  const auto& p = static_cast<const DoubleBackwardProblem&>(problem);
  const BackwardShape<C> shape(p);
  const RunShape<C> run = jvp_shape<C>(p);
  Arena shared(nullptr), scratch(nullptr), jvp(nullptr);
  DoubleBackwardShared<C>(shared, p, shape);
  DoubleBackwardScratch<C>(scratch, p, shape);
  JvpScratch<C>(jvp, p, p.tangent, run);
  Plan plan;
  plan.phases[plan.phase_count++] = {p.batch * p.heads, run_backward_rows<C>};
  add_delta_phase(p, plan);
  plan.phases[plan.phase_count++] = {run.jobs, JvpJob<C, DoubleBackwardProblem>::run};
  plan.phases[plan.phase_count++] = {p.batch * p.heads, run_delta_tangent<C>};
  plan.phases[plan.phase_count++] = {shape.jobs, DoubleBackwardBlocks<C>::run};
  plan.phases[plan.phase_count++] = {p.batch * p.heads, run_double_backward_queries<C>};
  plan.shared_bytes = shared.used();
  plan.scratch_bytes = maximum(plan.scratch_bytes, maximum(scratch.used(), jvp.used()));
  return plan;
}

}  // namespace
}  // namespace attention_ext
