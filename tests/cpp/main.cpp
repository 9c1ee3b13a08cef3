// Optional argument n: of the cases of the kernels only every n-th, for machines that emulate.
#include <cstdio>
#include <cstdlib>

#include "check.h"

int main(int count, char** words) {
  using namespace attention_ext::test;
  test_headers();
  test_vectors();
  test_kernels(count > 1 ? std::atoi(words[1]) : 1);
  std::printf("%ld checks, %ld failures\n", tally().checks.load(), tally().failures.load());
  return tally().failures == 0 ? 0 : 1;
}
