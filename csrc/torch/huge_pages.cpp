#include "torch/huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace attention_ext {

namespace {

constexpr uintptr_t kHugePage = 2 << 20;
constexpr size_t kLarge = 2 * kHugePage;

}  // namespace

const at::Tensor& on_huge_pages(const at::Tensor& fresh) {
#ifdef __linux__
  if (!fresh.is_cpu() || fresh.nbytes() < kLarge) return fresh;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (begin + fresh.nbytes()) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // a hint: where it is refused, nothing is lost
#endif
  return fresh;
}

}  // namespace attention_ext
