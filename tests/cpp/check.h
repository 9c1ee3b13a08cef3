// A test is a function; CHECK counts and reports, it does not stop.
#pragma once

#include <atomic>
#include <cstdio>
#include <string>

namespace attention_ext::test {

// Threads of a kernel check the guards of their memory.
struct Tally {
  std::atomic<long> checks = 0, failures = 0;
};

inline Tally& tally() {
  static Tally counts;
  return counts;
}

constexpr long kMostReports = 20;

inline void check(bool holds, const std::string& what) {
  ++tally().checks;
  if (!holds && ++tally().failures <= kMostReports) std::fprintf(stderr, "FAILED %s\n", what.c_str());
}

void test_headers();
void test_vectors();
void test_kernels(int every);

}  // namespace attention_ext::test
