// The row of the GPU kernel table that a call selects, if any, with stub planners.
#include "gpu/table.cpp"

#include <cstdio>

namespace attention_ext {

int64_t blocks_of_plan = 1;

#define STUB_PLANNER(planner, ...)            \
  template <__VA_ARGS__>                      \
  Plan planner(const AttentionProblem&) {     \
    Plan plan;                                \
    plan.launch_count = 1;                    \
    plan.launches[0].blocks = blocks_of_plan; \
    return plan;                              \
  }
STUB_PLANNER(plan_forward, class Plan, class Element)
STUB_PLANNER(plan_decode, class Plan, class Element)
STUB_PLANNER(plan_backward, class Plan, class Element)
STUB_PLANNER(plan_weights, class Plan, class Element)
STUB_PLANNER(plan_jvp, class Plan, class Element)
STUB_PLANNER(plan_double_backward, class Plan, class Element)
STUB_PLANNER(plan_simt_forward, class Plan)
STUB_PLANNER(plan_simt_backward, class Plan)
STUB_PLANNER(plan_simt_weights, class Plan)
STUB_PLANNER(plan_simt_jvp, class Plan)
STUB_PLANNER(plan_simt_double_backward, class Plan)

template <>
void add_clear_unowned<GpuPlan>(GpuPlan&, Pass, const AttentionProblem&) {}

}  // namespace attention_ext

namespace {

using attention_ext::DType;
using attention_ext::Pass;

struct Case {
  Pass pass;
  DType dtype;
  int64_t head_dim, head_dim_v;
  const char* row;
  bool allow_tf32 = false;
  int64_t queries = 64;
  int64_t packed = 0;  // sequences, of so many queries altogether
};

const Case kCases[] = {
    {Pass::kForward, DType::kFloat32, 256, 256, "sm80/forward"},
    {Pass::kForward, DType::kFloat32, 264, 8, "simt/forward"},
    {Pass::kForward, DType::kFloat16, 256, 8, "sm80/decode", false, 16},
    {Pass::kForward, DType::kFloat16, 256, 8, "sm80/forward", false, 17},
    {Pass::kForward, DType::kFloat16, 264, 8, "simt/forward", false, 1},
    {Pass::kForward, DType::kFloat16, 64, 64, "sm80/decode", false, 512, 32},
    {Pass::kForward, DType::kFloat16, 64, 64, "sm80/forward", false, 513, 32},
    {Pass::kForward, DType::kFloat16, 8, 264, "simt/forward"},
    {Pass::kForward, DType::kFloat32, 256, 8, "sm80_tf32/forward", true},
    {Pass::kForward, DType::kFloat32, 257, 8, "simt/forward", true},
    {Pass::kForward, DType::kFloat64, 64, 64, "sm80/forward", true},
    {Pass::kBackward, DType::kFloat32, 64, 64, "sm80_tf32/backward", true},
    {Pass::kJvp, DType::kFloat32, 64, 64, "sm80/jvp", true},
    {Pass::kBackward, DType::kBFloat16, 72, 256, "sm80/backward"},
    {Pass::kBackward, DType::kBFloat16, 300, 300, "simt/backward"},
    {Pass::kWeights, DType::kFloat64, 256, 0, "sm80/weights"},
    {Pass::kWeights, DType::kFloat64, 257, 0, "simt/weights"},
    {Pass::kJvp, DType::kFloat64, 128, 128, "sm80/jvp"},
    {Pass::kJvp, DType::kFloat64, 129, 8, "simt/jvp"},
    {Pass::kJvp, DType::kFloat32, 129, 8, "sm80/jvp"},
    {Pass::kDoubleBackward, DType::kFloat64, 128, 128, "sm80/double_backward"},
    {Pass::kDoubleBackward, DType::kFloat64, 8, 130, "simt/double_backward"},
    {Pass::kDoubleBackward, DType::kFloat16, 256, 256, "sm80/double_backward"},
};

bool serves_any(const attention_ext::AttentionProblem& problem) {
  return attention_ext::select_gpu_kernel(Pass::kForward, problem, 80) != nullptr;
}

// Calls that an int cannot count are refused by every row.
int wrong_at_limits() {
  constexpr int64_t kMost = (int64_t{1} << 30) - 1;
  int wrong = 0;
  for (int64_t attention_ext::AttentionProblem::* size :
       {&attention_ext::AttentionProblem::max_seqlen_q, &attention_ext::AttentionProblem::max_seqlen_k,
        &attention_ext::AttentionProblem::head_dim, &attention_ext::AttentionProblem::head_dim_v}) {
    attention_ext::AttentionProblem problem;
    problem.*size = kMost;
    wrong += !serves_any(problem);
    problem.*size = kMost + 1;
    wrong += serves_any(problem);
  }
  attention_ext::blocks_of_plan = INT32_MAX;
  wrong += !serves_any({});
  attention_ext::blocks_of_plan = int64_t{INT32_MAX} + 1;
  wrong += serves_any({});
  if (wrong > 0) std::printf("%d calls at the limits are served or refused wrongly\n", wrong);
  return wrong;
}

}  // namespace

int main() {
  int wrong = 0;
  for (const Case& c : kCases) {
    attention_ext::AttentionProblem problem;
    problem.head_dim = c.head_dim;
    problem.head_dim_v = c.head_dim_v;
    problem.dtype = c.dtype;
    problem.allow_tf32 = c.allow_tf32;
    problem.seqlen_q = problem.max_seqlen_q = c.queries;
    problem.max_seqlen_k = 64;
    const int64_t unread = 0;
    if (c.packed > 0) problem.cu_seqlens_q = &unread;
    problem.batch = c.packed;
    for (const int capability : {80, 90}) {
      const attention_ext::GpuKernel* kernel = attention_ext::select_gpu_kernel(c.pass, problem, capability);
      if (kernel && std::strcmp(kernel->name, c.row) == 0) continue;
      std::printf("head_dim %lld and %lld: expected %s, got %s\n", static_cast<long long>(c.head_dim),
                  static_cast<long long>(c.head_dim_v), c.row, kernel ? kernel->name : "none");
      ++wrong;
    }
  }
  return wrong + wrong_at_limits() > 0;
}
