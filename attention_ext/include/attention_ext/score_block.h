// Blocks of scores as kernels hand them to a compiled score_mod, and the functions that attention_ext.flex generates
// for them.
#pragma once

#include <cstdint>

namespace attention_ext {

// A tensor that a score_mod reads by index. Strides count elements.
struct CapturedTensor {
  const void* data;
  const int64_t *sizes, *strides;
  double* grad;  // contiguous, to be added to; null where not wanted
};

// Scores of one head: those of a key are neighbours, those of a query `stride` apart.
struct ScoreBlock {
  int64_t batch, head, query, key;  // of the first score
  int64_t queries, keys, stride;
  double scale;  // a score is this times a dot product, before the score_mod
  const CapturedTensor* captured;
};

// Both return false where an index was outside a captured tensor; what they read then is some element of it.
// Dot products, in float or double, become modified scores, in place.
using ScoreModFunction = bool (*)(const ScoreBlock& block, void* dot);
// The gradient of modified scores becomes that of the scores, in place, from the dot products; 0 stays 0. Gradients of
// captured tensors are added to theirs.
using ScoreModGradient = bool (*)(const ScoreBlock& block, const void* dot, void* grad);

struct ScoreModCall {
  ScoreModFunction function;
  ScoreModGradient gradient;       // null where the derivative is 1 and captured tensors want none
  const CapturedTensor* captured;  // (copies, count)
  int64_t count;
  int64_t
      copies;  // of the gradients of captured tensors, to be summed: as many jobs add to them; 0 where none are wanted
  bool* index_error;
};

}  // namespace attention_ext
