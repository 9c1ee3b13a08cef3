// In the place of cuda.cpp where the library is built without CUDA: says so, where torch would list its backends.
#include <ATen/core/stack.h>
#include <torch/library.h>

namespace attention_ext {

namespace {

void refuse(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().operator_name().name,
                              ": expected CPU tensors, got CUDA tensors: attention_ext was built without CUDA; with a "
                              "torch that has CUDA, and nvcc, build it again with `ATTENTION_EXT_CUDA=1 pip install "
                              "--no-build-isolation -e .`");
}

TORCH_LIBRARY_IMPL(attention_ext, CUDA, m) {
  for (const char* name : {"attention_forward", "attention_backward", "attention_jvp", "attention_double_backward",
                           "attention_weights_forward", "attention_explain"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}

}  // namespace

}  // namespace attention_ext
