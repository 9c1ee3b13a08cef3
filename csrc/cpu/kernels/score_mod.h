// A call's compiled score_mod, applied to a block of a tile.
#pragma once

#include "attention_ext/score_block.h"
#include "cpu/kernels/tile.h"

namespace attention_ext {
namespace {

// copy: of the gradients of captured tensors
template <class T>
ScoreBlock score_block(const AttentionProblem& p, const Tile& tile, Range k, Matrix<T> score, int64_t copy) {
  const ScoreModCall& mod = *p.score_mod;
  return {tile.sequence.batch,    tile.head,     p.query_offset + tile.q.begin,
          p.key_offset + k.begin, tile.q.size(), k.size(),
          score.stride,           p.scale,       mod.captured + copy * mod.count};
}

inline void note_index_error(const ScoreModCall& mod) { __atomic_store_n(mod.index_error, true, __ATOMIC_RELAXED); }

// Dot products become scores.
template <class T>
void apply_score_mod(const AttentionProblem& p, const Tile& tile, Range k, Matrix<T> dot) {
  const bool found = p.score_mod->function(score_block(p, tile, k, dot, 0), dot.data);
  if (!found) note_index_error(*p.score_mod);
}

// grad_score: of modified scores, becomes that of the scores before
template <class T>
void score_mod_gradient(const AttentionProblem& p, const Tile& tile, Range k, Matrix<T> dot, Matrix<T> grad_score,
                        int64_t copy) {
  const bool found = p.score_mod->gradient(score_block(p, tile, k, dot, copy), dot.data, grad_score.data);
  if (!found) note_index_error(*p.score_mod);
}

}  // namespace
}  // namespace attention_ext
