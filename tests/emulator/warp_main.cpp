// The emulated warp layer: products, shuffles, copies that complete at their wait, and errors.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>

#include "gpu/warp/warp.h"

namespace attention_ext {
namespace {

void check(bool condition, const char* what) {
  if (condition) return;
  std::printf("%s\n", what);
  std::exit(1);
}

template <class Body>
void run_warps(int warps, size_t shared_bytes, Body body) {
  emulation::Block::run(0, warps * kWarpSize, shared_bytes, &body,
                        [](void* argument) { (*static_cast<Body*>(argument))(); });
}

template <class Body>
bool fails_with(const char* text, Body body) {
  try {
    run_warps(2, 256, body);
  } catch (const std::runtime_error& error) {
    return std::strstr(error.what(), text) != nullptr;
  }
  return false;
}

void test_shuffle_and_vote() {
  run_warps(2, 0, [] {
    check(shuffle_xor(thread_index(), 5) == (thread_index() ^ 5), "shuffle_xor gives the value of another lane");
    check(any_in_warp(thread_index() == 40) == (thread_index() >= kWarpSize), "any_in_warp is of one warp only");
  });
}

// a 16 x 16 times b 16 x 8, with a[i][j] = i + 1 if j == perm(i), so that c[i][n] = (i + 1) b[perm(i)][n].
void test_product() {
  run_warps(1, 0, [] {
    const int group = thread_index() / 4, member = thread_index() % 4;
    const auto a = [](int i, int j) { return j == (5 * i + 3) % 16 ? static_cast<float>(i + 1) : 0.0f; };
    const auto b = [](int j, int n) { return static_cast<float>(8 * j + n); };
    uint32_t a_pairs[4], b_pairs[2];
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8, column = member * 2 + i / 2 * 8;
      a_pairs[i] = narrow_pair(Half{}, a(row, column), a(row, column + 1));
    }
    for (int i = 0; i < 2; ++i) {
      const int row = member * 2 + i * 8;
      b_pairs[i] = narrow_pair(Half{}, b(row, group), b(row + 1, group));
    }
    float c[4] = {1, 1, 1, 1};
    multiply_16x8x16(Half{}, c, a_pairs, b_pairs);
    for (int i = 0; i < 4; ++i) {
      const int row = group + i / 2 * 8, column = member * 2 + i % 2;
      check(c[i] == 1 + static_cast<float>(row + 1) * b((5 * row + 3) % 16, column), "multiply_16x8x16");
    }
  });
}

// The same of a 16 x 8 times b 8 x 8 in doubles, by each of the instructions that make it.
void test_product_of_doubles() {
  for (const char* core : {"sm_80", "sm_90"}) {
    setenv("ATTENTION_EXT_TENSOR_CORE", core, 1);
    run_warps(1, 0, [] {
      const int group = thread_index() / 4, member = thread_index() % 4;
      double a[4] = {}, b[2], c[4] = {1, 1, 1, 1};
      for (int i = 0; i < 4; ++i) {
        const int row = group + i % 2 * 8, column = member + i / 2 * 4;
        if (column == (5 * row + 3) % 8) a[i] = row + 1;
      }
      for (int i = 0; i < 2; ++i) b[i] = 8 * (member + i * 4) + group;
      multiply_16x8x8(c, a, b);
      for (int i = 0; i < 4; ++i) {
        const int row = group + i / 2 * 8, column = member * 2 + i % 2;
        check(c[i] == 1 + (row + 1) * (8 * ((5 * row + 3) % 8) + column), "multiply_16x8x8 of doubles");
      }
    });
  }
  unsetenv("ATTENTION_EXT_TENSOR_CORE");
}

using emulation::OperandType, emulation::TensorCore;
constexpr OperandType kHalf{16, 16, 2, -14}, kTf32{16, 8, 4, -126};

// c + sum of terms * 1
float sum_on(const TensorCore& core, const OperandType& type, float c, std::initializer_list<float> terms) {
  emulation::Operands<float> x{};
  x.c[5][3] = c;
  int k = 0;
  for (const float term : terms) {
    x.a[5][k] = term;
    x.b[k++][3] = 1;
  }
  emulation::multiply(core, type, x);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) check((m == 5 && n == 3) || x.c[m][n] == 0, "a sum goes to its own place");
  }
  return x.c[5][3];
}

// As the papers that tensor_core.h names have measured it; an eps is the distance from 1 to the next float.
void test_sums_are_cut_off() {
  using emulation::kNearest, emulation::kSm80, emulation::kSm90;
  constexpr float kEps = 0x1p-23f;
  for (const OperandType& type : {kHalf, kTf32}) {
    check(sum_on(kSm80, type, 1, {kEps / 2, kEps / 2}) == 1 + kEps, "sm_80 keeps one bit below a float");
    check(sum_on(kSm80, type, 1, {kEps / 4, kEps / 4, kEps / 4, kEps / 4}) == 1, "sm_80 keeps no second bit");
    check(sum_on(kSm90, type, 1, {kEps / 4, kEps / 4, kEps / 4, kEps / 4}) == 1 + kEps, "sm_90 keeps two bits");
    check(sum_on({16, 0}, type, 1, {kEps / 2, kEps / 2}) == 1, "without extra bits all below is lost");
    check(sum_on(kSm80, type, 1, {kEps, kEps / 2}) == 1 + kEps, "a sum is cut off, not rounded");
    check(sum_on(kNearest, type, 1, {kEps, kEps / 2}) == 1 + 2 * kEps, "sums to nearest can be asked for");
    check(sum_on(kSm80, type, -1, {-kEps, -kEps / 2}) == -1 - kEps, "towards 0 on either side");
    check(sum_on(kSm80, type, -1, {kEps / 4}) == -1 && sum_on(kSm80, type, 1, {-kEps / 4}) == 1, "not downwards");
    check(sum_on(kSm80, type, 0, {1, kEps / 2, kEps / 2}) == 1 + kEps,
          "terms are aligned with the largest of them too");
    check(sum_on(kSm80, type, 0, {0x1p-10f, -0x1p-10f}) == 0, "what cancels is 0");
    check(sum_on(kSm80, type, HUGE_VALF, {1}) == HUGE_VALF, "an infinity");
    check(std::isnan(sum_on(kSm80, type, NAN, {1})), "a NaN");
  }
  // A block of sm_80 is 16 bytes of a row, one of sm_90 32.
  check(sum_on(kSm80, kTf32, 1, {kEps / 2, 0, 0, 0, kEps / 2}) == 1, "sm_80 adds four tf32 terms at once");
  check(sum_on(kSm90, kTf32, 1, {kEps / 2, 0, 0, 0, kEps / 2}) == 1 + kEps, "sm_90 adds eight");
  check(sum_on(kSm80, kHalf, 1, {kEps / 2, 0, 0, 0, 0, 0, 0, kEps / 2}) == 1 + kEps, "sm_80 adds eight 16-bit terms");
  check(sum_on(kSm80, kHalf, 1, {kEps / 2, 0, 0, 0, 0, 0, 0, 0, kEps / 2}) == 1, "and no more");
  check(sum_on(kSm90, kHalf, 1, {kEps / 2, 0, 0, 0, 0, 0, 0, 0, kEps / 2}) == 1 + kEps, "sm_90 adds sixteen");
  check(sum_on(kSm80, kTf32, 0x1p-126f, {-0x1p-127f}) == 0x1p-127f, "a subnormal sum");
  check(TensorCore::named("sm_90").extra_bits == 2 && TensorCore::named("nearest").block_bytes == 0, "names");
}

void test_copies_complete_at_their_wait() {
  alignas(16) static const float source[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  run_warps(1, 2 * 16 * kWarpSize, [] {
    auto* first = reinterpret_cast<float*>(shared_memory()) + 8 * thread_index();
    check(first[0] != first[0], "shared memory starts as NaN");
    copy_async(shared_address(first), source, 16);
    commit_copies();
    copy_async(shared_address(first + 4), source + 4, 8);
    commit_copies();
    check(first[0] != first[0], "a copy is not complete before its wait");
    wait_copies<1>();
    check(first[3] == 4 && first[4] != first[4], "wait_copies<1> is for all groups but the last");
    wait_copies<0>();
    check(first[5] == 6 && first[6] == 0, "the rest of 16 bytes is 0");
  });
}

void test_errors() {
  check(fails_with("in vain",
                   [] {
                     if (thread_index() != 7) synchronize_block();
                   }),
        "a barrier that a thread misses");
  check(fails_with("different places",
                   [] {
                     if (thread_index() % 2) {
                       shuffle_xor(1, 1);
                     } else {
                       any_in_warp(true);
                     }
                   }),
        "lanes of a warp at different collectives");
  check(fails_with("out of shared memory",
                   [] {
                     uint32_t to[4];
                     load_matrices(to, 256);
                   }),
        "reading past shared memory");
  check(fails_with("misaligned", [] { copy_async(8, nullptr, 0); }), "a misaligned copy");
  check(fails_with("on their way",
                   [] {
                     copy_async(0, nullptr, 0);
                     wait_copies<0>();  // waits for committed groups, and there is none
                   }),
        "a copy that nothing waits for");
}

// `first` and `second` of different warps, after thread 40 has written the word that they share.
template <class First, class Second>
auto in_two_threads(First first, Second second, bool barrier = false) {
  return [=] {
    int* const word = reinterpret_cast<int*>(shared_memory());
    if (thread_index() == 40) store_shared(word, 1);
    synchronize_block();
    if (thread_index() == 0) first(word);
    if (barrier) synchronize_block();
    if (thread_index() == 40) second(word);
    synchronize_block();
  };
}

void test_accesses_without_order() {
  const auto load = [](const int* word) { load_shared(word); };
  const auto store = [](int* word) { store_shared(word, 1); };  // what is there already
  const auto copy = [](int* word) { copy_async(shared_address(word), nullptr, 0); };
  const auto copy_and_wait = [=](int* word) {
    copy(word);
    commit_copies();
    wait_copies<0>();
  };
  run_warps(2, 256, in_two_threads(load, load));
  run_warps(2, 256, in_two_threads(load, store, true));
  run_warps(2, 256, in_two_threads(store, load, true));
  run_warps(2, 256, in_two_threads(copy_and_wait, load, true));
  const char* const text = "without a barrier";
  check(fails_with(text, in_two_threads(store, load)), "a read after a write");
  check(fails_with(text, in_two_threads(load, store)), "a write after a read");
  check(fails_with(text, in_two_threads(store, store)), "a write after a write");
  check(fails_with(text, in_two_threads(copy_and_wait, load)), "a read after a copy of another thread");
  check(fails_with("may not have reached", in_two_threads(copy, load, true)), "a read during a copy");
  check(fails_with("may not have reached", in_two_threads(
                                               [=](int* word) {
                                                 copy(word);
                                                 load(word);
                                               },
                                               [](int*) {})),
        "a read of an own copy before its wait");
  check(fails_with("nothing has written", [] { load_shared(reinterpret_cast<int*>(shared_memory())); }),
        "a read before any write");
  check(fails_with("a store out of shared memory", [] { store_shared(shared_memory() + 256, char{}); }),
        "a write past the end");
}

}  // namespace
}  // namespace attention_ext

int main() {
  attention_ext::test_shuffle_and_vote();
  attention_ext::test_product();
  attention_ext::test_product_of_doubles();
  attention_ext::test_sums_are_cut_off();
  attention_ext::test_copies_complete_at_their_wait();
  attention_ext::test_errors();
  attention_ext::test_accesses_without_order();
}
