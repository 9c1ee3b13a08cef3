#include "torch/numbers.h"

#include <algorithm>
#include <cmath>

#include "core/philox.h"

namespace attention_ext {

namespace {

constexpr double kLeastSoftcap = 1e-30;         // so that float32 holds its reciprocal
constexpr double kSoftcapWithoutEffect = 1e30;  // changes no score below 1e25, and float32 quotients by it vanish

constexpr int64_t kLargestOffset = int64_t{1} << 30;  // so that a distance between positions fits 32 bits

void check_offset(const char* op, const char* name, const c10::SymInt& offset) {
  TORCH_SYM_CHECK(offset.sym_ge(0).sym_and(offset.sym_le(kLargestOffset)), op, ": expected `", name,
                  "` to be from 0 to ", kLargestOffset, ", got ", offset);
}

void check_window(const char* op, const char* name, const std::optional<c10::SymInt>& window) {
  if (window) {
    TORCH_SYM_CHECK(window->sym_ge(0), op, ": expected `", name, "` to be at least 0 or None, got ", *window);
  }
}

int64_t window_side(const std::optional<c10::SymInt>& window) {
  return window ? std::min(window->expect_int(), kUnlimited) : kUnlimited;
}

}  // namespace

void check_numbers(const char* op, const AttentionOptions& options, c10::Device device) {
  TORCH_CHECK(options.dropout_p >= 0 && options.dropout_p <= 1, op, ": expected `dropout_p` to be in [0, 1], got ",
              options.dropout_p);
  TORCH_CHECK(!options.scale || std::isfinite(*options.scale), op, ": expected `scale` to be finite or None, got ",
              *options.scale);
  TORCH_CHECK(options.softcap == 0 || (options.softcap >= kLeastSoftcap && std::isfinite(options.softcap)), op,
              ": expected `softcap` to be 0 (none), or finite and at least ", kLeastSoftcap, ", got ", options.softcap);
  check_window(op, "window_left", options.window_left);
  check_window(op, "window_right", options.window_right);
  check_offset(op, "query_offset", options.query_offset);
  check_offset(op, "key_offset", options.key_offset);
  if (options.dropout_p > 0 && device.is_cuda()) {
    TORCH_SYM_CHECK((options.key_offset % kKeysPerPhilox).sym_eq(0), op, ": expected `key_offset` to be a multiple of ",
                    kKeysPerPhilox, " with `dropout_p` on a GPU, got ", options.key_offset);
  }
  TORCH_CHECK(is_bottom_right(options) || options.causal_alignment == "top_left", op,
              ": expected `causal_alignment` to be \"top_left\" or \"bottom_right\", got \"", options.causal_alignment,
              "\"");
}

void fill_numbers(AttentionProblem& problem, const AttentionOptions& options) {
  problem.scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(problem.head_dim)));
  problem.softcap = options.softcap < kSoftcapWithoutEffect ? options.softcap : 0;
  problem.window_left = window_side(options.window_left);
  problem.window_right = options.is_causal ? 0 : window_side(options.window_right);
  problem.bottom_right = is_bottom_right(options);
  problem.query_offset = options.query_offset.expect_int();
  problem.key_offset = options.key_offset.expect_int();
  problem.dropout_p = options.dropout_p;
}

}  // namespace attention_ext
