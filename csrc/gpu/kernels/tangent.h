// Logsumexp as the passes after forward read it, and tangents of scores.
#pragma once

#include "gpu/kernels/softmax.h"

namespace attention_ext {
namespace {

// Of one head; queries past the end, and those that see no key, have logsumexp +inf, which makes every weight 0.
template <class T>
struct LogsumexpRows {
  const T* data;
  int end;

  ATTENTION_DEVICE LogsumexpRows(const AttentionProblem& p, const Head& head, const void* logsumexp)
      : data(static_cast<const T*>(logsumexp) + row_of(p, head.sequence, head.head)),
        end(static_cast<int>(head.sequence.length_q)) {}

  ATTENTION_DEVICE T row(int q) const { return q >= end || data[q] == -infinity<T>() ? infinity<T>() : data[q]; }
};

template <class T>
struct ScoreTangent {
  T score, dot;  // of the score and of scale * query . key
};

// dot_tangent: query' . key + query . key', not scaled
template <class Block, class Score, class T>
ATTENTION_DEVICE ScoreTangent<T> score_tangent(const AttentionProblem& p, const Tangents& tangent, const Block& block,
                                               const Score& score, T dot_tangent, int q, int k) {
  ScoreTangent<T> result{T(0), dot_tangent * static_cast<T>(p.scale)};
  result.score = result.dot * score.softcap_grad;
  if (tangent.attn_mask) result.score += block.number_of(tangent.attn_mask, q, k);
  if (tangent.alibi_slopes) {
    const double slope = tangent.alibi_slopes[block.head.sequence.batch * p.heads + block.head.head];
    result.score += static_cast<T>(slope) * block.head.mods.alibi.template slope_grad<NumberOps<T>>(block.at(q, k));
  }
  return result;
}

}  // namespace
}  // namespace attention_ext
