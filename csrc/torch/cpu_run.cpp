#include "torch/cpu_run.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <atomic>

namespace attention_ext {

namespace {

constexpr int64_t kAlignment = 64;
constexpr double kWorthThreads = 1 << 17;  // multiply-adds; waking threads costs microseconds

std::atomic<const char*> forced_kernels[std::size(kPassNames)];
std::atomic<int64_t> call_counts[std::size(kPassNames)];

int64_t align(size_t bytes) { return (static_cast<int64_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment; }

bool is_worth_threads(const AttentionProblem& problem) {
  const double scores = static_cast<double>(problem.heads) * static_cast<double>(problem.batch) *
                        static_cast<double>(problem.max_seqlen_q) * static_cast<double>(problem.max_seqlen_k);
  return scores * static_cast<double>(problem.head_dim + problem.head_dim_v) >= kWorthThreads;
}

const CpuKernel* select(Pass pass, const AttentionProblem& problem) {
  return select_cpu_kernel(pass, problem, forced_kernels[static_cast<int>(pass)].load(std::memory_order_relaxed));
}

// Workers draw jobs from one counter; which worker runs a job has no influence on its result.
void run_phase(const Phase& phase, const AttentionProblem& problem, char* shared, char* scratch, int64_t scratch_bytes,
               int64_t workers) {
  if (workers == 1) {
    for (int64_t job = 0; job < phase.jobs; ++job) phase.run(problem, shared, scratch, job);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      char* own = scratch + worker * scratch_bytes;
      for (int64_t job = next++; job < phase.jobs; job = next++) phase.run(problem, shared, own, job);
    }
  });
}

}  // namespace

Pass pass_of(std::string_view name) {
  for (size_t i = 0; i < std::size(kPassNames); ++i) {
    if (name == kPassNames[i]) return static_cast<Pass>(i);
  }
  TORCH_CHECK(false, "attention_ext: expected a pass to be one of ", at::ArrayRef<const char*>(kPassNames), ", got ",
              name);
}

void run_on_cpu(Pass pass, const AttentionProblem& problem) {
  const CpuKernel* kernel = select(pass, problem);
  TORCH_CHECK_NOT_IMPLEMENTED(kernel, "attention_ext: no CPU kernel serves this call:\n",
                              explain_cpu_kernels(pass, problem));
  const Plan plan = kernel->plan(problem);
  int64_t most_jobs = 1;
  for (int i = 0; i < plan.phase_count; ++i) most_jobs = std::max(most_jobs, plan.phases[i].jobs);
  const bool serial = at::in_parallel_region() || !is_worth_threads(problem);
  const int64_t threads = serial ? 1 : std::min<int64_t>(at::get_num_threads(), most_jobs);

  const int64_t shared_bytes = align(plan.shared_bytes), scratch_bytes = align(plan.scratch_bytes);
  const at::Tensor memory = at::empty({shared_bytes + threads * scratch_bytes}, at::kByte);
  char* shared = static_cast<char*>(memory.data_ptr());
  char* scratch = shared + shared_bytes;
  for (int i = 0; i < plan.phase_count; ++i) {
    const Phase& phase = plan.phases[i];
    run_phase(phase, problem, shared, scratch, scratch_bytes, std::max<int64_t>(1, std::min(threads, phase.jobs)));
  }
}

std::string explain_cpu_kernels(Pass pass, const AttentionProblem& problem) {
  const CpuKernel* chosen = select(pass, problem);
  std::string text;
  for (const CpuKernel& kernel : cpu_kernels()) {
    if (kernel.pass != pass) continue;
    const char* reason = kernel.on_request ? kOnRequest : kernel.why_not(problem);
    text += std::string(kernel.name) + ": " + (&kernel == chosen ? "chosen" : reason ? reason : "would serve") + "\n";
  }
  return text;
}

void force_cpu_kernel(Pass pass, const std::string& name) {
  const char* found = nullptr;
  for (const CpuKernel& kernel : cpu_kernels()) {
    if (kernel.pass == pass && name == kernel.name) found = kernel.name;
  }
  TORCH_CHECK(found || name.empty(), "attention_ext: expected the name of a kernel of this pass, got \"", name, "\"");
  forced_kernels[static_cast<int>(pass)] = found;
}

int64_t call_count(Pass pass) { return call_counts[static_cast<int>(pass)]; }

void count_call(Pass pass) { call_counts[static_cast<int>(pass)].fetch_add(1, std::memory_order_relaxed); }

}  // namespace attention_ext
