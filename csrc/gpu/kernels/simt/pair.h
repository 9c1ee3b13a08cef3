// What a query and a key make of each other: score, weight, and how these move. A warp works on one pair at a time, and
// every lane has every result.
#pragma once

#include "gpu/kernels/gradient.h"
#include "gpu/kernels/simt/rows.h"

namespace attention_ext {
namespace {
namespace simt {

// Of one head.
template <class T>
struct Pairs {
  using Score = Modified<NumberOps<T>>;
  const AttentionProblem& p;
  const Head& head;
  HeadRows query, key;
  Dropout dropout;

  ATTENTION_DEVICE Pairs(const AttentionProblem& problem, const Head& of)
      : p(problem),
        head(of),
        query(query_rows(of, p.query, p.head_dim)),
        key(key_rows(of, p.key, p.head_dim)),
        dropout(dropout_of(p)) {}

  ATTENTION_DEVICE ScoreBlock<T, Rules::kAll> block() const { return {p, head, {0, 0}, true}; }

  ATTENTION_DEVICE Score score(int q, int k) const { return block().score(dot<T>(query, q, key, k), q, k); }

  // What dropout makes of a weight of 1.
  ATTENTION_DEVICE T kept(int q, int k) const {
    if (!dropout.present) return T(1);
    const auto words =
        philox<WordOps>(dropout.key, static_cast<uint32_t>(q), static_cast<uint32_t>(k / kKeysPerPhilox),
                        static_cast<uint32_t>(head.sequence.batch * p.heads + head.head), dropout.offset);
    return bits_of_key(words, k) >= dropout.threshold ? static_cast<T>(dropout.kept_scale) : T(0);
  }

  ATTENTION_DEVICE double sink() const { return p.sinks[head.sequence.batch * p.sinks_stride_b + head.head]; }
};

// How scores move along tangents of the inputs.
template <class T>
struct PairTangents {
  const Pairs<T>& pairs;
  const Tangents& tangent;
  HeadRows query, key, value;

  ATTENTION_DEVICE PairTangents(const Pairs<T>& of, const Tangents& along)
      : pairs(of),
        tangent(along),
        query(query_rows(of.head, along.query, of.p.head_dim)),
        key(key_rows(of.head, along.key, of.p.head_dim)),
        value(key_rows(of.head, along.value, of.p.head_dim_v)) {}

  ATTENTION_DEVICE ScoreTangent<T> score(const typename Pairs<T>::Score& score, int q, int k) const {
    T moved = 0;
    if (query) moved += dot<T>(query, q, pairs.key, k);
    if (key) moved += dot<T>(pairs.query, q, key, k);
    return score_tangent(pairs.p, tangent, pairs.block(), score, moved, q, k);
  }
};

// All of second order, where that is asked for, but `of_dot_still`.
template <class T>
struct PairGradient {
  T weight;        // what multiplies grad_out for grad_value
  T score;         // the gradient of the score
  T dot;           // of scale * query . key, which multiplies query or key
  T of_dot_still;  // the same of first order, which multiplies their tangents
};

template <class T, Order kOrder>
class PairGradients {
  static constexpr bool kSecond = kOrder == Order::kSecond;

 public:
  Pairs<T> pairs;
  HeadRows value, grad_out;
  RowSource<T, kOrder> rows;

  ATTENTION_DEVICE PairGradients(const ProblemOf<kOrder>& p, const Head& head, const BackwardMemory<T>& memory)
      : pairs(p, head),
        value(key_rows(head, p.value, p.head_dim_v)),
        grad_out(query_rows(head, p.grad_out, p.head_dim_v)),
        rows(p, head, memory),
        p_(p) {}

  // Rows that stand still are null.
  ATTENTION_DEVICE HeadRows query_tangent() const {
    if constexpr (kSecond) return query_rows(pairs.head, p_.tangent.query, p_.head_dim);
    return {};
  }
  ATTENTION_DEVICE HeadRows key_tangent() const {
    if constexpr (kSecond) return key_rows(pairs.head, p_.tangent.key, p_.head_dim);
    return {};
  }

  // Where a weight is 0 so is its gradient, whatever hidden rows hold.
  ATTENTION_DEVICE PairGradient<T> operator()(int q, int k, const RowNumbers<T>& row) const {
    const auto score = pairs.score(q, k);
    const T prob = weight_of<Rules::kAll>(score.score, T(1), row.logsumexp);
    if (prob == T(0)) return {};
    const T kept = pairs.kept(q, k);
    const T centred = of_weight(value, q, k, kept) - row.delta, grad = prob * centred;
    if constexpr (kSecond) {
      const PairTangents<T> tangents(pairs, p_.tangent);
      const auto tangent = tangents.score(score, q, k);
      const T moved_prob = prob * (tangent.score - row.logsumexp_tangent);
      const T moved_centred = of_weight(tangents.value, q, k, kept) - row.delta_tangent;
      const T moved_grad = multiply_add(moved_prob, centred, prob * moved_centred);
      return {moved_prob * kept, moved_grad, multiply_add(moved_grad, score.slope, grad * score.curve * tangent.dot),
              grad * score.slope};
    }
    return {prob * kept, grad, grad * score.slope, T(0)};
  }

 private:
  // grad_out . values, seen through dropout.
  ATTENTION_DEVICE T of_weight(const HeadRows& values, int q, int k, T kept) const {
    return values && kept != T(0) ? dot<T>(grad_out, q, values, k) * kept : T(0);
  }

  const ProblemOf<kOrder>& p_;
};

}  // namespace simt
}  // namespace
}  // namespace attention_ext
