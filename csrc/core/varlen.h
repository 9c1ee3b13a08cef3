// Which rows of the tensors one sequence of the batch owns, and where its diagonal runs.
#pragma once

#include "core/numeric.h"
#include "core/problem.h"

namespace attention_ext {

// q and k below count within the sequence; add begin_q and begin_k for rows of the tensors.
struct Sequence {
  int64_t batch;         // index for masks, slopes, dropout
  int64_t tensor_batch;  // index into query, key, value: 0 with cu_seqlens
  int64_t begin_q, begin_k;
  int64_t length_q, length_k;  // length_k ends at key_lengths
  int64_t diagonal;            // diagonal(q) = q + diagonal
};

// Lengths on a GPU are never checked: whatever they hold, rows stay within the tensors and max_seqlen.
ATTENTION_INLINE Range packed_rows(const int64_t* cu_seqlens, int64_t b, int64_t total, int64_t max_seqlen) {
  const int64_t begin = clamp(cu_seqlens[b], 0, total);
  return {begin, clamp(cu_seqlens[b + 1], begin, minimum(total, begin + max_seqlen))};
}

ATTENTION_INLINE Sequence sequence_of(const AttentionProblem& p, int64_t b) {
  Sequence s{b, b, 0, 0, p.seqlen_q, p.seqlen_k, 0};
  if (p.cu_seqlens_q) {
    const Range q = packed_rows(p.cu_seqlens_q, b, p.seqlen_q, p.max_seqlen_q);
    const Range k = packed_rows(p.cu_seqlens_k, b, p.seqlen_k, p.max_seqlen_k);
    s = {b, 0, q.begin, k.begin, q.size(), k.size(), 0};
  }
  if (p.key_lengths) s.length_k = clamp(p.key_lengths[b], 0, p.seqlen_k);
  s.diagonal = p.query_offset - p.key_offset + (p.bottom_right ? s.length_k - s.length_q : 0);
  return s;
}

// One number per query: index of query 0 of the sequence in (b, h, q).
ATTENTION_INLINE int64_t row_of(const AttentionProblem& p, const Sequence& s, int64_t head) {
  return (s.tensor_batch * p.heads + head) * p.seqlen_q + s.begin_q;
}

// The keys that any query of `q` may see: outside it nothing is read.
ATTENTION_INLINE Range visible_keys(const AttentionProblem& p, const Sequence& s, Range q) {
  const int64_t begin = maximum<int64_t>(0, q.begin + s.diagonal - p.window_left);
  const int64_t end = minimum(s.length_k, q.end + s.diagonal + p.window_right);
  return begin < end ? Range{begin, end} : Range{};
}

// The queries that may see any key of `k`.
ATTENTION_INLINE Range visible_queries(const AttentionProblem& p, const Sequence& s, Range k) {
  const int64_t begin = maximum<int64_t>(0, k.begin - s.diagonal - p.window_right);
  const int64_t end = minimum(s.length_q, minimum(k.end, s.length_k) - s.diagonal + p.window_left);
  return begin < end && k.begin < s.length_k ? Range{begin, end} : Range{};
}

}  // namespace attention_ext
