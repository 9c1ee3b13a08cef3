// Any number of leading dimensions, as torch's own function takes them, folded into the one batch dimension of the
// operators that have kernels.
#pragma once

#include "torch/ops.h"

namespace attention_ext {

// False for the shapes that kernels take, and for tensors that they refuse by name.
bool needs_folding(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                   const AttentionOptions& options);

// (..., H, L, D) each, as (B, H, L, D). Leading dimensions broadcast. So does a single head, unless heads are grouped:
// a single head of keys and values is grouping under another name, and cheaper so.
class FoldedCall {
 public:
  FoldedCall(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
             const AttentionOptions& options);

  at::Tensor query, key, value;
  AttentionOptions options;
  int64_t rank;  // of the output

  // (B, ...) with the call's own leading dimensions, of which the last ones that give `result_rank` are kept.
  at::Tensor unfold(const at::Tensor& result, int64_t result_rank) const;
  c10::SymDimVector unfolded_sizes(c10::SymIntArrayRef sizes, int64_t result_rank) const;

 private:
  c10::SymDimVector batch_;  // the leading sizes that B stands for
};

}  // namespace attention_ext
