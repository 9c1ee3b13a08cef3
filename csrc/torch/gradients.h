// The six gradients while a kernel makes them: buffers as a BackwardProblem wants them, then results as autograd does.
#pragma once

#include "torch/outputs.h"
#include "torch/problem.h"

namespace attention_ext {

class GradientBuffers {
 public:
  // Points the gradient fields of the problem at new buffers, those that are wanted and exist.
  GradientBuffers(BackwardProblem& problem, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const AttentionOptions& options, const ops::OutputMask& output_mask);

  void zero() const;

  // The gradients summed over broadcast dimensions, in the shapes and dtypes of the inputs.
  ops::Gradients results() const;

 private:
  using Inputs = decltype(ops::differentiable({}, {}, {}, {}));

  Inputs inputs_;
  std::array<at::Tensor, ops::kInputs> gradients_;  // undefined where not wanted
};

}  // namespace attention_ext
