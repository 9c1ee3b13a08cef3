// What becomes of results below the smallest normal number.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace attention_ext {

// Of this thread and while it lives, 0. Weights of keys far below a row's maximum are such numbers, and Intel's cores
// need some 150 cycles for each operation that makes or reads one. Inputs stay what they are. AArch64 cores do not
// mind.
class TinyResultsAreZero {
 public:
#if defined(__x86_64__)
  TinyResultsAreZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~TinyResultsAreZero() { _mm_setcsr(before_); }
#else
  TinyResultsAreZero() = default;
  ~TinyResultsAreZero() {}
#endif
  TinyResultsAreZero(const TinyResultsAreZero&) = delete;
  TinyResultsAreZero& operator=(const TinyResultsAreZero&) = delete;

#if defined(__x86_64__)
 private:
  unsigned before_;
#endif
};

}  // namespace attention_ext
