// From tensors to the Problem that kernels read, once `checks.h` has accepted the arguments.
#pragma once

#include "core/problem.h"
#include "torch/checks.h"

namespace attention_ext {

// Tensors made on the way (slopes as doubles, lengths as int64): they must outlive the Problem that points at them.
using Converted = c10::SmallVector<at::Tensor, 4>;

// value and rng_state may be null. On the CPU the values of key_lengths and cu_seqlens are verified.
void fill_problem(AttentionProblem& problem, Converted& converted, const char* op, const Sizes& sizes,
                  const at::Tensor& query, const at::Tensor& key, const at::Tensor* value, const at::Tensor* rng_state,
                  const AttentionOptions& options);

void fill_tangents(Tangents& filled, Converted& converted, const char* op, const AttentionProblem& problem,
                   const ops::InputTangents& tangents);

// A 4-D tensor as it is.
View view_of(const at::Tensor& tensor);

// A tensor of up to four dimensions that broadcasts: dimensions of size 1, or in front, get stride 0.
View broadcast_view_of(const at::Tensor& tensor);

const void* contiguous_data(const at::Tensor& tensor, Converted& converted);

}  // namespace attention_ext
