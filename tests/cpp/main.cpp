// The optional argument n runs only every n-th case of the kernel tests, for emulated machines.
#include <cstdio>
#include <cstdlib>

#include "check.h"

int main(int argc, char** argv) {
  using namespace attention_ext::test;
  test_headers();
  test_vectors();
  test_kernels(argc > 1 ? std::atoi(argv[1]) : 1);
  std::printf("%ld checks, %ld failures\n", tally().checks.load(), tally().failures.load());
  return tally().failures == 0 ? 0 : 1;
}
