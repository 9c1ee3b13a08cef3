// Fresh memory that is cheap to write to for the first time.
#pragma once

#include <ATen/core/Tensor.h>

namespace attention_ext {

// Asks the system to back a large tensor that nothing was written to by huge pages, as numpy does for its arrays: first
// writes then fault once in 2 MB, not once in 4 KB, which costs more than the writes. Does nothing elsewhere than on
// Linux, and for other devices than CPUs. Returns its argument.
at::Tensor on_huge_pages(at::Tensor fresh);

}  // namespace attention_ext
