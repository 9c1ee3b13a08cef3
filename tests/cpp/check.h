// Tests are functions; check() counts and reports failures and goes on.
#pragma once

#include <atomic>
#include <cstdio>
#include <string>

namespace attention_ext::test {

// Atomic, since each thread of a kernel checks the guards of its memory.
struct Tally {
  std::atomic<long> checks = 0, failures = 0;
};

inline Tally& tally() {
  static Tally counts;
  return counts;
}

constexpr long kMaxReports = 20;

inline void check(bool holds, const std::string& what) {
  ++tally().checks;
  if (!holds && ++tally().failures <= kMaxReports) std::fprintf(stderr, "FAILED %s\n", what.c_str());
}

void test_headers();
void test_vectors();
void test_kernels(int every);

}  // namespace attention_ext::test
