// Results below the smallest normal number become 0 within a scope.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace attention_ext {

// Sets flush-to-zero for this thread while it lives. Weights of keys far below a row's maximum are denormal, and
// Intel's cores need some 150 cycles for each operation that produces or reads one. Inputs are not flushed. AArch64
// cores need no such mode.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushDenormals() { _mm_setcsr(before_); }
#else
  FlushDenormals() = default;
  ~FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

#if defined(__x86_64__)
 private:
  unsigned before_;
#endif
};

}  // namespace attention_ext
