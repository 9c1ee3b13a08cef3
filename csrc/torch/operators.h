// The operators, the same on every device that has kernels.
#pragma once

#include <torch/library.h>

namespace attention_ext {

void implement_operators(torch::Library& m);

}  // namespace attention_ext
