// Every row of the kernel table that this CPU can run: right numbers, no byte touched outside the buffers, and the same
// bits for any order of jobs and for several threads.
#include <atomic>
#include <string_view>
#include <thread>

#include "call.h"
#include "core/kernel_table.h"

namespace attention_ext::test {

namespace {

enum class Order : uint8_t { kForwards, kBackwards, kThreads };

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

void run(const CpuKernel& kernel, const AttentionProblem& problem, Order order) {
  const Plan plan = kernel.plan(problem);
  constexpr int kThreads = 3;
  Guarded shared(aligned(plan.shared_bytes));
  for (int i = 0; i < plan.phase_count; ++i) {
    const Phase& phase = plan.phases[i];
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      Guarded scratch(aligned(plan.scratch_bytes));
      for (int64_t job = next++; job < phase.jobs; job = next++) {
        phase.run(problem, shared.data(), scratch.data(), order == Order::kBackwards ? phase.jobs - 1 - job : job);
      }
    };
    if (order != Order::kThreads) {
      work();
      continue;
    }
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) threads.emplace_back(work);
    for (std::thread& thread : threads) thread.join();
  }
}

double tolerance(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 1e-12;
    case DType::kFloat32:
      return 2e-5;
    case DType::kFloat16:
      return 1e-2;
    default:
      return 6e-2;
  }
}

void compare(const std::string& what, double got, double want, double allowed) {
  const bool same = got == want || (std::isnan(got) && std::isnan(want));
  const bool close = std::abs(got - want) <= allowed * (1 + std::abs(want));
  if (!same && !close)
    check(false, what + ": expected " + std::to_string(want) + ", got " + std::to_string(got));
  else
    ++tally().checks;
}

void compare(const std::string& what, const Array& got, Numbers& want, double allowed) {
  for (int64_t b = 0; b < got.sizes[0]; ++b) {
    for (int64_t h = 0; h < got.sizes[1]; ++h) {
      for (int64_t row = 0; row < got.sizes[2]; ++row) {
        for (int64_t column = 0; column < got.sizes[3]; ++column) {
          compare(what, got.at(b, h, row, column), want.at(b, h, row, column), allowed);
        }
      }
    }
  }
}

void compare(const std::string& what, const Guarded& got, const Numbers& want, double allowed) {
  for (size_t i = 0; i < want.values.size(); ++i) {
    compare(what, static_cast<const double*>(got.data())[i], want.values[i], allowed);
  }
}

std::vector<char> bytes_of(const std::vector<const Guarded*>& buffers) {
  std::vector<char> bytes;
  for (const Guarded* buffer : buffers) {
    const char* data = static_cast<const char*>(buffer->data());
    bytes.insert(bytes.end(), data, data + buffer->bytes());
  }
  return bytes;
}

// Runs the kernel in each order over poisoned outputs, which must come out alike.
template <class Prepare>
void run_in_every_order(const std::string& what, const CpuKernel& kernel, const std::vector<Guarded*>& outputs,
                        Prepare&& prepare) {
  std::vector<char> first;
  for (const Order order : {Order::kForwards, Order::kBackwards, Order::kThreads}) {
    for (Guarded* output : outputs) output->poison();
    const auto problem = prepare();
    run(kernel, problem, order);
    const auto bytes = bytes_of({outputs.begin(), outputs.end()});
    if (order == Order::kForwards) first = bytes;
    check(bytes == first, what + ": the order of jobs changes the result");
  }
}

void test_forward(const std::string& what, const CpuKernel& kernel, Call& call, Expected& expected) {
  run_in_every_order(what, kernel, {&call.out.memory, &call.logsumexp.memory}, [&] { return call.forward(); });
  compare(what + " out", call.out, expected.out, tolerance(call.dtype));
  compare(what + " logsumexp", call.logsumexp, expected.logsumexp, std::min(1e-4, tolerance(call.dtype)));
}

void test_backward(const std::string& what, const CpuKernel& kernel, Call& call, Expected& expected) {
  std::vector<Guarded*> outputs{&call.grad_query.memory, &call.grad_key.memory, &call.grad_value.memory};
  if (call.spec.alibi) outputs.push_back(&call.grad_slopes);
  if (call.spec.sinks) outputs.push_back(&call.grad_sinks);
  if (call.grad_mask) outputs.push_back(&call.grad_mask->memory);
  run_in_every_order(what, kernel, outputs, [&] { return call.backward(); });
  const double allowed = tolerance(call.dtype), sums = allowed * 8;
  compare(what + " grad_query", call.grad_query, expected.grad_query, allowed);
  compare(what + " grad_key", call.grad_key, expected.grad_key, sums);
  compare(what + " grad_value", call.grad_value, expected.grad_value, sums);
  if (call.spec.alibi) compare(what + " grad_slopes", call.grad_slopes, expected.grad_slopes, sums * 8);
  if (call.spec.sinks) compare(what + " grad_sinks", call.grad_sinks, expected.grad_sinks, sums);
  if (call.grad_mask && call.mask->view.dtype != DType::kBool) {
    compare(what + " grad_mask", *call.grad_mask, expected.grad_mask, sums);
  }
}

void test_weights(const std::string& what, const CpuKernel& kernel, Call& call, Expected& expected) {
  run_in_every_order(what, kernel, {&call.weights.memory}, [&] { return call.weights_problem(); });
  compare(what + " weights", call.weights, expected.weights, tolerance(call.dtype));
}

// Numbers that came by differences, and sums of many: compared in the scale of the whole array.
void compare_moves(const std::string& what, const Array& got, Numbers& want, DType dtype) {
  double scale = 0;
  for (const double x : want.values) scale = std::max(scale, std::abs(x));
  compare(what, got, want, std::max(2e-7, 2 * tolerance(dtype)) * (1 + scale));
}

void test_jvp(const std::string& what, const CpuKernel& kernel, Call& call, Expected& moves) {
  run_in_every_order(what, kernel, {&call.out_tangent.memory, &call.logsumexp_tangent.memory},
                     [&] { return call.jvp(); });
  compare_moves(what + " out", call.out_tangent, moves.out, call.dtype);
  compare_moves(what + " logsumexp", call.logsumexp_tangent, moves.logsumexp, call.dtype);
}

void test_double_backward(const std::string& what, const CpuKernel& kernel, Call& call, Expected& moves,
                          bool compute_out_tangent) {
  std::vector<Guarded*> outputs{&call.logsumexp_tangent.memory, &call.grad_query.memory, &call.grad_key.memory,
                                &call.grad_value.memory};
  if (compute_out_tangent) outputs.push_back(&call.out_tangent.memory);
  if (call.spec.alibi) outputs.push_back(&call.grad_slopes);
  if (call.spec.sinks) outputs.push_back(&call.grad_sinks);
  run_in_every_order(what, kernel, outputs, [&] { return call.double_backward(compute_out_tangent); });
  if (compute_out_tangent) compare_moves(what + " out", call.out_tangent, moves.out, call.dtype);
  compare_moves(what + " logsumexp", call.logsumexp_tangent, moves.logsumexp, call.dtype);
  compare_moves(what + " grad_query", call.grad_query, moves.grad_query, call.dtype);
  compare_moves(what + " grad_key", call.grad_key, moves.grad_key, call.dtype);
  compare_moves(what + " grad_value", call.grad_value, moves.grad_value, call.dtype);
  if (call.mask_tangent) compare_moves(what + " grad_mask", *call.grad_mask, moves.grad_mask, call.dtype);
}

void test_kernel(const CpuKernel& kernel, Call& call, Expected& expected, Expected& moves) {
  const auto refuses = [&](const AttentionProblem& problem) { return kernel.why_not(problem) != nullptr; };
  const std::string what = std::string(kernel.name) + " " + name_of(call.dtype) + " " + call.spec.name;
  switch (kernel.pass) {
    case Pass::kForward:
      if (!refuses(call.forward())) test_forward(what, kernel, call, expected);
      break;
    case Pass::kBackward:
      if (!refuses(call.backward())) test_backward(what, kernel, call, expected);
      break;
    case Pass::kWeights:
      if (!call.spec.varlen && !refuses(call.weights_problem())) test_weights(what, kernel, call, expected);
      break;
    case Pass::kJvp:
      if (!refuses(call.jvp())) test_jvp(what, kernel, call, moves);
      break;
    case Pass::kDoubleBackward:
      if (refuses(call.double_backward())) break;
      test_double_backward(what, kernel, call, moves, true);
      test_double_backward(what + " without out's", kernel, call, moves, false);
      break;
  }
}

void test_case(const Case& spec) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    Call call(spec, dtype);
    Expected expected = expect(call), moves = expect_moves(call);
    // A forward kernel first, so that out and logsumexp are there when the others read them.
    for (const bool forward : {true, false}) {
      for (const CpuKernel& kernel : cpu_kernels()) {
        if ((kernel.pass == Pass::kForward) == forward) test_kernel(kernel, call, expected, moves);
      }
    }
  }
}

// A thread's memory is bounded, whatever the length.
template <class Problem>
void test_scratch(const CpuKernel& kernel) {
  int planned = 0;
  bool lacked = false;
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t head_dim : {64, 128, 256}) {
      for (const auto& [length_q, length_k] : {std::pair{2048, 2048}, {65536, 65536}, {1, 65536}}) {
        double number = 0;
        const View view{&number, dtype, 1, 1, 1, 1};
        Problem p;
        p.batch = p.heads = p.kv_heads = 1;
        p.seqlen_q = p.max_seqlen_q = length_q;
        p.seqlen_k = p.max_seqlen_k = length_k;
        p.head_dim = p.head_dim_v = head_dim;
        p.dtype = dtype;
        p.query = p.key = p.value = p.attn_mask = view;
        p.softcap = 1;
        if constexpr (requires { p.grad_query; }) p.grad_query = p.grad_key = p.grad_value = view;
        if constexpr (requires { p.tangent; }) {
          p.tangent.query = p.tangent.key = p.tangent.value = p.tangent.attn_mask = view;
        }
        if (const char* reason = kernel.why_not(p)) {
          lacked |= std::string_view(reason).ends_with("which this CPU lacks");
          continue;
        }
        const size_t bytes = kernel.plan(p).scratch_bytes;
        check(bytes <= size_t{4} << 20,
              std::string(kernel.name) + " takes " + std::to_string(bytes) + " bytes a thread");
        ++planned;
      }
    }
  }
  check(planned > 0 || lacked, std::string(kernel.name) + " was never planned");
}

void test_scratch_of(const CpuKernel& kernel) {
  switch (kernel.pass) {
    case Pass::kForward:
      return test_scratch<ForwardProblem>(kernel);
    case Pass::kBackward:
      return test_scratch<BackwardProblem>(kernel);
    case Pass::kWeights:
      return test_scratch<WeightsProblem>(kernel);
    case Pass::kJvp:
      return test_scratch<JvpProblem>(kernel);
    case Pass::kDoubleBackward:
      return test_scratch<DoubleBackwardProblem>(kernel);
  }
}

std::vector<Case> cases() {
  std::vector<Case> list;
  // Sizes around vectors (4, 8, 16), query tiles (16 to 64) and key blocks (6 rows, 192).
  const int64_t lengths[][2] = {{1, 1},    {2, 5},    {15, 6},  {17, 7},  {33, 64},
                                {65, 193}, {64, 192}, {1, 200}, {5, 191}, {130, 13}};
  for (const auto& [q, k] : lengths) {
    list.push_back({.name = "lengths " + std::to_string(q) + " x " + std::to_string(k), .seqlen_q = q, .seqlen_k = k});
  }
  for (const int64_t d : {1, 3, 16, 17, 31, 64, 72}) {
    list.push_back(
        {.name = "head_dim " + std::to_string(d), .seqlen_q = 18, .seqlen_k = 20, .head_dim = d, .head_dim_v = 80 - d});
  }
  const Case base{.name = "", .seqlen_q = 37, .seqlen_k = 70, .head_dim = 12, .head_dim_v = 9};
  const auto add = [&](const char* name, auto&& change) {
    Case c = base;
    c.name = name;
    change(c);
    list.push_back(c);
  };
  add("heads last", [](Case& c) { c.heads_last = true; });
  add("multi-query", [](Case& c) { c.heads = 5; });
  add("bool mask", [](Case& c) { c.mask = Mask::kBool; });
  add("float mask", [](Case& c) { c.mask = Mask::kFloat; });
  add("float mask per key", [](Case& c) { c.mask = Mask::kFloatPerKey; });
  add("float mask per query", [](Case& c) { c.mask = Mask::kFloatPerQuery; });
  add("causal", [](Case& c) { c.window_right = 0; });
  add("causal bottom right", [](Case& c) {
    c.window_right = 0;
    c.bottom_right = true;
  });
  add("window", [](Case& c) {
    c.window_left = 9;
    c.window_right = 3;
  });
  add("window past the keys", [](Case& c) {
    c.heads = 3;
    c.seqlen_q = 193;
    c.seqlen_k = 65;
    c.window_left = 70;
  });
  add("hidden rows", [](Case& c) {
    c.window_right = 0;
    c.bottom_right = true;
    c.seqlen_k = 20;
  });
  add("softcap", [](Case& c) { c.softcap = 1.5; });
  add("alibi", [](Case& c) { c.alibi = true; });
  add("sinks", [](Case& c) {
    c.sinks = true;
    c.mask = Mask::kBool;
  });
  add("negative scale", [](Case& c) { c.scale = -0.4; });
  add("key lengths", [](Case& c) {
    c.key_lengths = true;
    c.batch = 3;
  });
  add("varlen", [](Case& c) {
    c.varlen = true;
    c.batch = 1;
  });
  add("varlen causal", [](Case& c) {
    c.varlen = true;
    c.batch = 1;
    c.window_right = 0;
    c.bottom_right = true;
  });
  add("dropout", [](Case& c) { c.dropout_p = 0.3; });
  add("no value", [](Case& c) { c.head_dim_v = 0; });
  add("everything", [](Case& c) {
    c.seqlen_q = 70;
    c.seqlen_k = 210;
    c.heads = 4;
    c.kv_heads = 2;
    c.mask = Mask::kFloat;
    c.window_left = 150;
    c.window_right = 0;
    c.bottom_right = true;
    c.softcap = 2;
    c.alibi = c.sinks = c.key_lengths = c.heads_last = true;
    c.dropout_p = 0.2;
  });
  return list;
}

}  // namespace

void test_kernels(int every) {
  for (const CpuKernel& kernel : cpu_kernels()) test_scratch_of(kernel);
  int number = 0;
  for (const Case& spec : cases()) {
    if (number++ % every == 0) test_case(spec);
  }
}

}  // namespace attention_ext::test
