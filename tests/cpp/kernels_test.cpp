// Every row of the kernel table that this CPU can run: accuracy, no access outside the buffers, and bit-equal results
// for any order of jobs and several threads.
#include <atomic>
#include <string_view>
#include <thread>

#include "call.h"
#include "core/kernel_table.h"

namespace attention_ext::test {

namespace {

enum class Order : uint8_t { kForwards, kBackwards, kThreads };

#ifdef ATTENTION_EXT_TSAN
constexpr Order kOrders[] = {Order::kThreads};  // a single thread cannot race
#else
constexpr Order kOrders[] = {Order::kForwards, Order::kBackwards, Order::kThreads};
#endif

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Worker i begins with job i, so that each has one, and draws the rest from a counter that orders nothing else: a
// thread sanitizer sees every write of two jobs to the same place.
void run(const CpuKernel& kernel, const AttentionProblem& problem, Order order) {
  const Plan plan = kernel.plan(problem);
  const int64_t workers = order == Order::kThreads ? 3 : 1;
  Guarded shared(aligned(plan.shared_bytes));
  std::vector<Guarded> scratch;
  for (int64_t worker = 0; worker < workers; ++worker) scratch.emplace_back(aligned(plan.scratch_bytes));
  for (int i = 0; i < plan.phase_count; ++i) {
    const Phase& phase = plan.phases[i];
    std::atomic<int64_t> next{workers};
    const auto work = [&](int64_t worker) {
      Guarded& own = scratch[static_cast<size_t>(worker)];
      own.poison();
      for (int64_t job = worker; job < phase.jobs; job = next.fetch_add(1, std::memory_order_relaxed)) {
        phase.run(problem, shared.data(), own.data(), order == Order::kBackwards ? phase.jobs - 1 - job : job);
      }
    };
    if (workers == 1) {
      work(0);
      continue;
    }
    std::vector<std::thread> threads;
    for (int64_t worker = 0; worker < workers; ++worker) threads.emplace_back(work, worker);
    for (std::thread& thread : threads) thread.join();
  }
}

// The eps of the type that a kernel rounds the operands of its products to.
double product_eps(const CpuKernel& kernel, DType dtype) {
  const bool rounds_to_tf32 = std::string_view(kernel.name).find("tf32") != std::string_view::npos;
  return rounds_to_tf32 ? 0x1p-10 : eps_of(dtype);
}

void compare(const std::string& what, double got, double want, double allowed) {
  const bool same = got == want || (std::isnan(got) && std::isnan(want));
  const bool close = std::abs(got - want) <= allowed;
  if (!same && !close)
    check(false, what + ": expected " + std::to_string(want) + ", got " + std::to_string(got));
  else
    ++tally().checks;
}

// The bound of an error.
struct Bound {
  double relative, absolute;  // relative to the sum of the magnitudes of the terms
  double of(const Numbers& want, size_t i) const { return relative * want.magnitudes[i] + absolute; }
};

void compare(const std::string& what, const Array& got, const Numbers& want, Bound bound) {
  for (int64_t b = 0; b < got.sizes[0]; ++b) {
    for (int64_t h = 0; h < got.sizes[1]; ++h) {
      for (int64_t row = 0; row < got.sizes[2]; ++row) {
        for (int64_t column = 0; column < got.sizes[3]; ++column) {
          const size_t i = want.index(b, h, row, column);
          compare(what, got.at(b, h, row, column), want.values[i], bound.of(want, i));
        }
      }
    }
  }
}

void compare(const std::string& what, const Guarded& got, const Numbers& want, Bound bound) {
  for (size_t i = 0; i < want.values.size(); ++i) {
    compare(what, static_cast<const double*>(got.data())[i], want.values[i], bound.of(want, i));
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

// Runs the kernel in each order of jobs over poisoned outputs; the results must be bit-equal.
template <class Prepare>
void run_in_every_order(const std::string& what, const CpuKernel& kernel, const std::vector<Guarded*>& outputs,
                        Prepare&& prepare) {
  std::vector<char> first;
  for (const Order order : kOrders) {
    for (Guarded* output : outputs) output->poison();
    const auto problem = prepare();
    run(kernel, problem, order);
    const auto bytes = bytes_of({outputs.begin(), outputs.end()});
    if (order == kOrders[0]) first = bytes;
    check(bytes == first, what + ": the order of jobs changes the result");
  }
}

// Weights and small results of float16 may be subnormal, multiples of 2^-24.
Bound bound_of(const CpuKernel& kernel, DType dtype) {
  return {3 * product_eps(kernel, dtype), dtype == DType::kFloat16 ? 0x1p-24 : 0};
}

// The exponential of the bfloat16 kernel is less accurate than float32.
Bound logsumexp_bound_of(const CpuKernel& kernel, DType dtype) {
  return {dtype == DType::kBFloat16 ? 0x1p-16 : 3 * product_eps(kernel, accumulate_type(dtype)), 0};
}

// Tangents sum twice as many terms, and their expected values are central differences.
Bound tangent_bound_of(const CpuKernel& kernel, DType dtype) {
  const Bound bound = bound_of(kernel, dtype);
  return {2 * bound.relative + 1e-9, bound.absolute};
}

void test_forward(const std::string& what, const CpuKernel& kernel, Call& call, const Expected& expected) {
  run_in_every_order(what, kernel, {&call.out.memory, &call.logsumexp.memory}, [&] { return call.forward(); });
  compare(what + " out", call.out, expected.out, bound_of(kernel, call.dtype));
  compare(what + " logsumexp", call.logsumexp, expected.logsumexp, logsumexp_bound_of(kernel, call.dtype));
}

void test_backward(const std::string& what, const CpuKernel& kernel, Call& call, const Expected& expected) {
  std::vector<Guarded*> outputs{&call.grad_query.memory, &call.grad_key.memory, &call.grad_value.memory};
  if (call.spec.alibi) outputs.push_back(&call.grad_slopes);
  if (call.spec.sinks) outputs.push_back(&call.grad_sinks);
  if (call.grad_mask) outputs.push_back(&call.grad_mask->memory);
  run_in_every_order(what, kernel, outputs, [&] { return call.backward(); });
  const Bound bound = bound_of(kernel, call.dtype);
  compare(what + " grad_query", call.grad_query, expected.grad_query, bound);
  compare(what + " grad_key", call.grad_key, expected.grad_key, bound);
  compare(what + " grad_value", call.grad_value, expected.grad_value, bound);
  if (call.spec.alibi) compare(what + " grad_slopes", call.grad_slopes, expected.grad_slopes, bound);
  if (call.spec.sinks) compare(what + " grad_sinks", call.grad_sinks, expected.grad_sinks, bound);
  if (call.mask_tangent) compare(what + " grad_mask", *call.grad_mask, expected.grad_mask, bound);
}

void test_weights(const std::string& what, const CpuKernel& kernel, Call& call, const Expected& expected) {
  const Bound bound = bound_of(kernel, call.dtype);
  run_in_every_order(what, kernel, {&call.weights.memory}, [&] { return call.weights_problem(false); });
  compare(what + " weights", call.weights, expected.weights, bound);
  run_in_every_order(what, kernel, {&call.mean_weights.memory}, [&] { return call.weights_problem(true); });
  compare(what + " mean weights", call.mean_weights, expected.mean_weights, bound);
}

void test_jvp(const std::string& what, const CpuKernel& kernel, Call& call, const Expected& tangents) {
  run_in_every_order(what, kernel, {&call.out_tangent.memory, &call.logsumexp_tangent.memory},
                     [&] { return call.jvp(); });
  const Bound bound = tangent_bound_of(kernel, call.dtype);
  compare(what + " out", call.out_tangent, tangents.out, bound);
  compare(what + " logsumexp", call.logsumexp_tangent, tangents.logsumexp, bound);
}

void test_double_backward(const std::string& what, const CpuKernel& kernel, Call& call, const Expected& tangents,
                          bool compute_out_tangent) {
  std::vector<Guarded*> outputs{&call.logsumexp_tangent.memory, &call.grad_query.memory, &call.grad_key.memory,
                                &call.grad_value.memory};
  if (compute_out_tangent) outputs.push_back(&call.out_tangent.memory);
  if (call.spec.alibi) outputs.push_back(&call.grad_slopes);
  if (call.spec.sinks) outputs.push_back(&call.grad_sinks);
  run_in_every_order(what, kernel, outputs, [&] { return call.double_backward(compute_out_tangent); });
  const Bound bound = tangent_bound_of(kernel, call.dtype);
  if (compute_out_tangent) compare(what + " out", call.out_tangent, tangents.out, bound);
  compare(what + " logsumexp", call.logsumexp_tangent, tangents.logsumexp, bound);
  compare(what + " grad_query", call.grad_query, tangents.grad_query, bound);
  compare(what + " grad_key", call.grad_key, tangents.grad_key, bound);
  compare(what + " grad_value", call.grad_value, tangents.grad_value, bound);
  if (call.mask_tangent) compare(what + " grad_mask", *call.grad_mask, tangents.grad_mask, bound);
  if (call.spec.alibi) compare(what + " grad_slopes", call.grad_slopes, tangents.grad_slopes, bound);
  if (call.spec.sinks) compare(what + " grad_sinks", call.grad_sinks, tangents.grad_sinks, bound);
}

void test_kernel(const CpuKernel& kernel, Call& call, const Expected& expected, const Expected& tangents) {
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
      if (!call.spec.varlen && !refuses(call.weights_problem(false))) test_weights(what, kernel, call, expected);
      break;
    case Pass::kJvp:
      if (!refuses(call.jvp())) test_jvp(what, kernel, call, tangents);
      break;
    case Pass::kDoubleBackward:
      if (refuses(call.double_backward())) break;
      test_double_backward(what, kernel, call, tangents, true);
      test_double_backward(what + " without out_tangent", kernel, call, tangents, false);
      break;
  }
}

void test_case(const Case& spec) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    Call call(spec, dtype);
    const Expected expected = expect(call), tangents = expected_tangents(call);
    // Forward kernels first: the others read their out and logsumexp.
    for (const bool forward : {true, false}) {
      for (const CpuKernel& kernel : cpu_kernels()) {
        if ((kernel.pass == Pass::kForward) == forward) test_kernel(kernel, call, expected, tangents);
      }
    }
  }
}

constexpr int64_t kMaxCopies = 5;  // of all inputs, in the accumulate type

// The memory of a thread is bounded, that of a call linear in the lengths.
template <class Problem>
void test_memory(const CpuKernel& kernel) {
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
        const Plan plan = kernel.plan(p);
        check(plan.scratch_bytes <= size_t{4} << 20,
              std::string(kernel.name) + " takes " + std::to_string(plan.scratch_bytes) + " bytes per thread");
        const int64_t elements = (length_q + length_k) * head_dim;
        check(plan.shared_bytes <= static_cast<size_t>(kMaxCopies * elements * size_of(accumulate_type(dtype))),
              std::string(kernel.name) + " takes " + std::to_string(plan.shared_bytes) + " bytes per call");
        ++planned;
      }
    }
  }
  check(planned > 0 || lacked, std::string(kernel.name) + " was never planned");
}

void test_memory_of(const CpuKernel& kernel) {
  switch (kernel.pass) {
    case Pass::kForward:
      return test_memory<ForwardProblem>(kernel);
    case Pass::kBackward:
      return test_memory<BackwardProblem>(kernel);
    case Pass::kWeights:
      return test_memory<WeightsProblem>(kernel);
    case Pass::kJvp:
      return test_memory<JvpProblem>(kernel);
    case Pass::kDoubleBackward:
      return test_memory<DoubleBackwardProblem>(kernel);
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
  add("sparse mask", [](Case& c) {
    c.block_q = 16;
    c.block_k = 24;
  });
  add("sparse mask of odd blocks, with a bool mask", [](Case& c) {
    c.seqlen_q = 150;
    c.seqlen_k = 230;
    c.block_q = 7;
    c.block_k = 8;
    c.mask = Mask::kBool;
    c.window_left = 130;
  });
  add("sparse mask of few queries", [](Case& c) {
    c.seqlen_q = 3;
    c.seqlen_k = 700;
    c.block_q = 2;
    c.block_k = 40;
    c.sinks = true;
    c.heads = 4;
    c.kv_heads = 2;
  });
  add("varlen sparse mask", [](Case& c) {
    c.varlen = true;
    c.batch = 1;
    c.block_q = 4;
    c.block_k = 16;
    c.window_right = 0;
  });
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
  add("shard", [](Case& c) {
    c.query_offset = 21;
    c.key_offset = 18;
    c.window_left = 9;
    c.window_right = 0;
    c.alibi = true;
    c.dropout_p = 0.3;
  });
#ifdef ATTENTION_EXT_EXTRA_MASK
  add("hidden keys", [](Case& c) {
    c.seqlen_q = 3;
    c.seqlen_k = 700;
    c.poisoned_from = 450;
  });
#endif
  add("many keys", [](Case& c) {  // decode splits them, backward deals their blocks to groups
    c.batch = 1;
    c.heads = 4;
    c.kv_heads = 2;
    c.seqlen_q = 3;
    c.seqlen_k = 1800;
    c.head_dim = c.head_dim_v = 4;
    c.alibi = c.sinks = true;
    c.slope = 0.001;
  });
  add("sparse mask of many keys", [](Case& c) {  // backward gives groups neighbouring blocks
    c.seqlen_q = 333;
    c.seqlen_k = 2000;
    c.head_dim = c.head_dim_v = 4;
    c.block_q = 48;
    c.block_k = 64;
    c.window_left = 50;
    c.window_right = 40;
    c.alibi = true;
    c.slope = 0.01;
  });
  add("many queries", [](Case& c) {  // double backward deals their tiles to groups
    c.batch = 1;
    c.seqlen_q = 1800;
    c.seqlen_k = 5;
    c.head_dim = c.head_dim_v = 4;
    c.alibi = true;
    c.slope = 0.001;
  });
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
  for (const CpuKernel& kernel : cpu_kernels()) test_memory_of(kernel);
  int number = 0;
  for (const Case& spec : cases()) {
    if (number++ % every == 0) test_case(spec);
  }
}

}  // namespace attention_ext::test
