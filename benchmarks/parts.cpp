// The times of the parts of a forward and a backward pass, each alone on operands in the cache: the functions of
// csrc/cpu/kernels, at their tile and block sizes. Compiled with -march=native.
#include <algorithm>
#include <chrono>
#include <memory>

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "cpu/vec/avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "cpu/vec/avx2.h"
#else
#include "cpu/vec/portable.h"
#endif

#if defined(__AVX512BF16__)
#include "cpu/kernels/bfloat16.h"
#endif
#include "cpu/kernels/backward.h"

namespace attention_ext {
namespace {

constexpr int kRepeats = 9, kCalls = 20;

// The shortest time of a call.
template <class Call>
double seconds(Call&& call) {
  using Clock = std::chrono::steady_clock;
  double best = 1e9;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const auto begin = Clock::now();
    for (int i = 0; i < kCalls; ++i) call();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count() / kCalls);
  }
  return best;
}

// One tile of queries against one block of keys.
template <class C>
class Parts {
  using T = typename C::Scalar;
  using Element = typename C::Element;

 public:
  Parts(int64_t head_dim, int64_t keys) : columns_(head_dim), depth_(head_dim / C::kPair), keys_(keys) {
    block_.k = {0, keys};
    block_.mods.scale = 0.1;
    for (int q = 0; q < kQueries<T>; ++q) logsumexp_[q] = delta_[q] = T(0.5);
  }

  // Packing rows of query or grad_out.
  double rows_in() {
    return seconds(
        [&] { transpose_rows<C>(as_operand(query_), kQueries<T>, kQueryVectors, depth_, columns_of_query_); });
  }
  double rows_out() {
    return seconds([&] { write_rows(source_of(rows_of_out_), kQueries<T>, columns_, as_operand(sums_), delta_); });
  }

  double scores() {
    return seconds([&] {
      multiply<C>(by_rows(as_operand(key_)), as_operand(columns_of_query_), depth_, score_, keys_, kQueryVectors,
                  Start::kZero);
    });
  }
  double softmax() {
    return seconds(
        [&] { softmax_block<C, kQueryVectors, ScoreMode::kNone>(block_, score_, {maximum_, sum_}, factor_, pairs_); });
  }
  double values() {
    const auto weight = C::kPair == 2 ? as_operand(pairs_) : weights_by_keys<C>(score_, keys_, kQueryVectors, nullptr);
    return seconds([&] {
      multiply<C>(by_columns(weight), as_operand(key_), keys_ / C::kPair, sums_, kQueries<T>, columns_ / kLanes<T>,
                  Start::kScaleAndAdd, {}, factor_);
    });
  }
  double weights() {
    return seconds([&] { operands(); });
  }
  // grad_key or grad_value.
  double key_gradient() {
    return seconds([&, by_query = operands().by_query] {
      multiply<C>(by_rows(by_query), as_operand(query_), kQueries<T> / C::kPair, grad_key_, keys_, columns_ / kLanes<T>,
                  Start::kAdd);
    });
  }
  double query_gradient() {
    return seconds([&, by_key = operands().by_key] {
      multiply<C>(by_columns(by_key), as_operand(key_), keys_ / C::kPair, sums_, kQueries<T>, columns_ / kLanes<T>,
                  Start::kAdd);
    });
  }

 private:
  GradientOperands<C> operands() {
    return plain_gradient_operands<C, kQueryVectors, ScoreMode::kNone>(block_, logsumexp_, delta_, score_, grad_score_,
                                                                       gradient_pairs_);
  }

  template <class X>
  Matrix<X> matrix(int64_t rows, int64_t columns) {
    return {memory_.take<X>(rows * columns), columns};
  }

  struct alignas(4096) Room {
    char bytes[4 << 20] = {};
  };

  std::unique_ptr<Room> room_ = std::make_unique<Room>();
  Arena memory_{room_->bytes};
  int64_t columns_, depth_, keys_;
  Block<T> block_{.k = {}, .mods = {}, .mode = ScoreMode::kNone, .bias = {}, .first_distance = {}};
  Matrix<Element> query_ = matrix<Element>(kQueries<T>, columns_), key_ = matrix<Element>(keys_, columns_),
                  columns_of_query_ = matrix<Element>(columns_, kQueries<T>),
                  pairs_ = matrix<Element>(keys_, kQueries<T>);
  Matrix<T> score_ = matrix<T>(keys_, kQueries<T>), grad_score_ = matrix<T>(keys_, kQueries<T>),
            sums_ = matrix<T>(kQueries<T>, columns_), rows_of_out_ = matrix<T>(kQueries<T>, columns_),
            grad_key_ = matrix<T>(keys_, columns_);
  GradientPairs<C> gradient_pairs_{memory_, keys_};
  T maximum_[kQueries<T>] = {}, sum_[kQueries<T>] = {}, factor_[kQueries<T>] = {},
    logsumexp_[kLogsumexpNumbers<T>] = {}, delta_[kQueries<T>] = {};
};

// The layout of Seconds in parts.py.
struct Seconds {
  double rows_in, rows_out, scores, softmax, values, weights, key_gradient, query_gradient;
};

template <class C>
Seconds measure(int64_t head_dim, int64_t keys) {
  Parts<C> parts(head_dim, keys);
  return {parts.rows_in(), parts.rows_out(), parts.scores(),       parts.softmax(),
          parts.values(),  parts.weights(),  parts.key_gradient(), parts.query_gradient()};
}

}  // namespace
}  // namespace attention_ext

using namespace attention_ext;

extern "C" {

int block_keys() { return kKeys; }
int tile_bytes() { return kQueryVectors * kVectorBytes; }

Seconds float32_parts(int64_t head_dim, int64_t keys) { return measure<FloatCompute>(head_dim, keys); }
Seconds float64_parts(int64_t head_dim, int64_t keys) { return measure<DoubleCompute>(head_dim, keys); }

// Without BF16 products bfloat16 is widened and computed as float32.
Seconds bfloat16_parts(int64_t head_dim, int64_t keys) {
#if defined(__AVX512BF16__)
  return measure<BFloat16Compute>(head_dim, keys);
#else
  return measure<FloatCompute>(head_dim, keys);
#endif
}
}
