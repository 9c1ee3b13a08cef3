// SPDX-License-Identifier: BSD-3-Clause
#include <cstdio>

#include "check.h"

int main() {
  using namespace attention_ext::test;
  test_headers();
  test_vectors();
  test_kernels();
  std::printf("%ld checks, %ld failures\n", tally().checks, tally().failures);
  return tally().failures == 0 ? 0 : 1;
}
