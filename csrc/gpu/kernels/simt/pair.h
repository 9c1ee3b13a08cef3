// Score and weight of a query and a key, and their tangents. A warp works on one pair at a time, and every lane has
// every result.
#pragma once

#include "gpu/kernels/gradient.h"
#include "gpu/kernels/simt/rows.h"

namespace attention_ext {
namespace {
namespace simt {

// Of one head.
template <class T>
struct Pairs {
  using Score = ModifiedScore<NumberOps<T>>;
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

  ATTENTION_DEVICE ScoreBlock<T, ScoreMode::kAll> block() const { return {p, head, {0, 0}, true}; }

  ATTENTION_DEVICE Score score(int q, int k) const {
    if (hidden_by_blocks(q, k)) return {-infinity<T>(), T(0), T(0)};
    auto position = block().at(q, k);
    if (head.mods.reads_bias()) position.bias = block().number_of(p.attn_mask, q, k);
    Score modified = head.mods.score_mod<NumberOps<T>>(dot<T>(query, q, key, k), position);
    modified.score = k < head.length_k ? head.mods.masked<NumberOps<T>>(modified.score, position) : -infinity<T>();
    return modified;
  }

  // The factor of dropout: 0, or kept_scale.
  ATTENTION_DEVICE T kept(int q, int k) const {
    if (!dropout.present) return T(1);
    const uint32_t position = dropout.first_key + static_cast<uint32_t>(k);
    const auto words = dropout.words<WordOps>(static_cast<uint32_t>(q), position / kKeysPerPhilox,
                                              dropout.batch_head(head.sequence.batch, head.head));
    return bits_of_key(words, static_cast<int>(position)) >= dropout.threshold ? static_cast<T>(dropout.kept_scale)
                                                                               : T(0);
  }

  ATTENTION_DEVICE bool hidden_by_blocks(int q, int k) const {
    if (!p.sparse_mask) return false;
    return (p.sparse_mask.octet(head.sequence.batch, head.head, static_cast<BlockIndex>(q),
                                static_cast<BlockIndex>(k) / 8 * 8) >>
                (k % 8) &
            1) == 0;
  }

  ATTENTION_DEVICE double sink() const { return p.sinks[head.sequence.batch * p.sinks_stride_b + head.head]; }
};

template <class T>
struct ScoreTangent {
  T score, dot;  // of the score and of scale * query . key
};

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
    T dot_tangent = 0;
    if (query) dot_tangent += dot<T>(query, q, pairs.key, k);
    if (key) dot_tangent += dot<T>(pairs.query, q, key, k);
    ScoreTangent<T> result{T(0), dot_tangent * static_cast<T>(pairs.p.scale)};
    result.score = result.dot * score.softcap_grad;
    if (tangent.attn_mask) result.score += pairs.block().number_of(tangent.attn_mask, q, k);
    if (tangent.alibi_slopes) {
      const double slope = tangent.alibi_slopes[pairs.head.sequence.batch * pairs.p.heads + pairs.head.head];
      const auto at = pairs.block().at(q, k);
      result.score += static_cast<T>(slope) * pairs.head.mods.alibi.template slope_grad<NumberOps<T>>(at);
    }
    return result;
  }
};

// All of second order, where that is asked for, but `first_order_dot`.
template <class T>
struct PairGradient {
  T weight;           // the factor of grad_out in grad_value
  T score;            // the gradient of the score
  T dot;              // the gradient of scale * query . key, the factor of query or key
  T first_order_dot;  // the same of first order, the factor of their tangents
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

  // Null means a zero tangent.
  ATTENTION_DEVICE HeadRows query_tangent() const {
    if constexpr (kSecond) return query_rows(pairs.head, p_.tangent.query, p_.head_dim);
    return {};
  }
  ATTENTION_DEVICE HeadRows key_tangent() const {
    if constexpr (kSecond) return key_rows(pairs.head, p_.tangent.key, p_.head_dim);
    return {};
  }

  // Where a weight is 0 so is its gradient, whatever hidden rows hold.
  ATTENTION_DEVICE PairGradient<T> operator()(int q, int k, const RowNumbers<T, kOrder>& row) const {
    const auto score = pairs.score(q, k);
    const T prob = weight_of<ScoreMode::kAll>(score.score, T(1), row.logsumexp);
    if (prob == T(0)) return {};
    const T kept = pairs.kept(q, k);
    const T centred = of_weight(value, q, k, kept) - row.delta, grad = prob * centred;
    if constexpr (kSecond) {
      const PairTangents<T> tangents(pairs, p_.tangent);
      const auto tangent = tangents.score(score, q, k);
      const T prob_tangent = prob * (tangent.score - row.logsumexp_tangent);
      const T centred_tangent = of_weight(tangents.value, q, k, kept) - row.delta_tangent;
      const T grad_tangent = multiply_add(prob_tangent, centred, prob * centred_tangent);
      return {prob_tangent * kept, grad_tangent,
              multiply_add(grad_tangent, score.softcap_grad, grad * score.softcap_grad2 * tangent.dot),
              grad * score.softcap_grad};
    }
    return {prob * kept, grad, grad * score.softcap_grad, T(0)};
  }

 private:
  // grad_out . values after dropout.
  ATTENTION_DEVICE T of_weight(const HeadRows& values, int q, int k, T kept) const {
    return values && kept != T(0) ? dot<T>(grad_out, q, values, k) * kept : T(0);
  }

  const ProblemOf<kOrder>& p_;
};

}  // namespace simt
}  // namespace
}  // namespace attention_ext
