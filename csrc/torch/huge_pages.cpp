#include "torch/huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace attention_ext {

namespace {

constexpr uintptr_t kHugePage = 2 << 20;
constexpr size_t kLarge = 2 * kHugePage;

}  // namespace

at::Tensor on_huge_pages(at::Tensor fresh) {
#ifdef __linux__
  if (!fresh.is_cpu() || fresh.nbytes() < kLarge) return fresh;
  auto* const data = static_cast<char*>(fresh.mutable_data_ptr());
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (begin + fresh.nbytes()) / kHugePage * kHugePage;
  madvise(data + (first - begin), end - first, MADV_HUGEPAGE);  // a hint: where it is refused, nothing is lost
#endif
  return fresh;
}

}  // namespace attention_ext
