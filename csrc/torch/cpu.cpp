// The CPU: kernels run on torch's threads and torch's memory.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>

#include "core/unowned.h"
#include "cpu/flush_denormals.h"
#include "torch/device.h"
#include "torch/operators.h"

namespace attention_ext {

namespace {

constexpr int64_t kAlignment = 64;
constexpr double kLeastParallelWork = 1 << 17;  // multiply-adds; waking threads costs microseconds
constexpr int64_t kStackBytes = 64 << 10;  // memory for small calls; an allocation would cost them more than the work

bool runs_in_parallel(const AttentionProblem& problem) {
  const double scores = static_cast<double>(problem.heads) * static_cast<double>(problem.batch) *
                        static_cast<double>(problem.max_seqlen_q) * static_cast<double>(problem.max_seqlen_k);
  return scores * static_cast<double>(problem.head_dim + problem.head_dim_v) >= kLeastParallelWork;
}

// Workers draw jobs from one counter; which worker runs a job has no influence on its result.
void run_phase(const Phase& phase, const AttentionProblem& problem, char* shared, char* scratch, int64_t scratch_bytes,
               int64_t workers) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t worker) {
    const FlushDenormals mode;
    char* own = scratch + worker * scratch_bytes;
    for (int64_t job = next++; job < phase.jobs; job = next++) phase.run(problem, shared, own, job);
  };
  if (workers == 1) return work(0);
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work(worker);
  });
}

void run(const CpuKernel& kernel, const AttentionProblem& problem) {
  const Plan plan = kernel.plan(problem);
  int64_t most_jobs = 1;
  for (int i = 0; i < plan.phase_count; ++i) most_jobs = std::max(most_jobs, plan.phases[i].jobs);
  const bool serial = at::in_parallel_region() || !runs_in_parallel(problem);
  const int64_t threads = serial ? 1 : std::min<int64_t>(at::get_num_threads(), most_jobs);

  const int64_t shared_bytes = round_up(static_cast<int64_t>(plan.shared_bytes), kAlignment);
  const int64_t scratch_bytes = round_up(static_cast<int64_t>(plan.scratch_bytes), kAlignment);
  const int64_t bytes = shared_bytes + threads * scratch_bytes;
  alignas(kAlignment) char on_stack[kStackBytes];
  at::Tensor on_heap;
  if (bytes > kStackBytes) on_heap = at::empty({bytes}, at::kByte);
  char* shared = on_heap.defined() ? static_cast<char*>(on_heap.data_ptr()) : on_stack;
  char* scratch = shared + shared_bytes;
  for (int i = 0; i < plan.phase_count; ++i) {
    const Phase& phase = plan.phases[i];
    run_phase(phase, problem, shared, scratch, scratch_bytes, std::max<int64_t>(1, std::min(threads, phase.jobs)));
  }
}

// Where a packed call has sequences that the kernel for few queries serves, and others, each kind has its kernel. False
// where one kernel serves them all.
bool run_by_length(Pass pass, const AttentionProblem& problem, const CpuKernel& kernel) {
  if (pass != Pass::kForward || !problem.cu_seqlens_q || problem.max_seqlen_q <= kFewQueries) return false;
  ForwardProblem few = static_cast<const ForwardProblem&>(problem), many = few;
  few.most_queries = few.max_seqlen_q = kFewQueries;
  many.least_queries = kFewQueries + 1;
  const CpuKernel* const for_few = select_cpu_kernel(pass, few, forced_kernel(pass));
  if (for_few == &kernel) return false;
  const auto has_few = [&] {
    for (int64_t b = 0; b < few.batch; ++b) {
      if (few.serves(b)) return true;
    }
    return false;
  };
  if (has_few()) run(*for_few, few);
  run(kernel, many);
  return true;
}

void clear_unowned(Pass pass, const AttentionProblem& p) {
  const UnownedRows queries{unowned_rows(p.cu_seqlens_q, p.batch, p.seqlen_q), {}};
  const UnownedRows keys{unowned_rows(p.cu_seqlens_k, p.batch, p.seqlen_k), {}};
  with_problem(pass, [&]<class Problem>(const Problem&) {
    if constexpr (!std::is_same_v<Problem, WeightsProblem>) {
      clear_unowned(static_cast<const Problem&>(p), queries, keys);
    }
  });
}

void run(Pass pass, const AttentionProblem& problem) {
  const CpuKernel* kernel = select_cpu_kernel(pass, problem, forced_kernel(pass));
  TORCH_CHECK_NOT_IMPLEMENTED(kernel, "attention_ext: no CPU kernel serves this call:\n",
                              explain_kernels(at::kCPU, pass, problem));
  if (!run_by_length(pass, problem, *kernel)) run(*kernel, problem);
  const bool clears = kernel->on_request;  // emulated kernels clear as a GPU's do
  if (problem.cu_seqlens_q && !clears) clear_unowned(pass, problem);
}

const char* why_not(const CpuKernel& kernel, const AttentionProblem& problem) {
  const char* forced = forced_kernel(kernel.pass);
  const bool is_requested = forced && std::strcmp(forced, kernel.name) == 0;
  return kernel.on_request && !is_requested ? kOnRequest : kernel.why_not(problem);
}

std::vector<KernelRow> kernels() {
  std::vector<KernelRow> rows;
  for (const CpuKernel& kernel : cpu_kernels()) {
    rows.push_back({kernel.name, kernel.pass, std::bind_front(why_not, std::cref(kernel))});
  }
  return rows;
}

int none() { return 0; }

const RegisterDevice kRegistered({at::kCPU, run, kernels, none, none});

TORCH_LIBRARY_IMPL(attention_ext, CPU, m) { implement_operators(m); }

// Tensors that the checks refuse come here, to be refused by name.
TORCH_LIBRARY_IMPL(attention_ext, SparseCPU, m) { implement_operators(m); }
TORCH_LIBRARY_IMPL(attention_ext, SparseCsrCPU, m) { implement_operators(m); }
TORCH_LIBRARY_IMPL(attention_ext, QuantizedCPU, m) { implement_operators(m); }
TORCH_LIBRARY_IMPL(attention_ext, MkldnnCPU, m) { implement_operators(m); }
TORCH_LIBRARY_IMPL(attention_ext, NestedTensorCPU, m) { implement_operators(m); }

}  // namespace

}  // namespace attention_ext
