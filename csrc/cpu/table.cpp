// The CPU rows of the kernel table, best first. A call takes the first row whose why_not is silent.
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <span>
#include <vector>

#include "core/kernel_table.h"
#include "cpu/unit.h"

namespace attention_ext {
namespace {

// Higher levels include lower ones: limiting the level by ATTENTION_EXT_ISA leaves the narrower rows in place.
struct InstructionSet {
  const char* name;
  int level;
  bool supported;
  const char* missing;
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const InstructionSet kAvx512Bf16 = {"avx512_bf16", 3, has_avx512() && __builtin_cpu_supports("avx512bf16"),
                                    "needs AVX-512 BF16, which this CPU lacks"};
const InstructionSet kAvx512 = {"avx512", 2, has_avx512(), "needs AVX-512 F, BW, DQ and VL, which this CPU lacks"};
const InstructionSet kAvx2 = {"avx2", 1, has_avx2(), "needs AVX2, FMA and F16C, which this CPU lacks"};
const InstructionSet kBaseline = {"baseline", 0, true, nullptr};
const InstructionSet* const kSets[] = {&kAvx512Bf16, &kAvx512, &kAvx2, &kBaseline};
#elif defined(__aarch64__)
const InstructionSet kNeon = {"neon", 0, true, nullptr};
const InstructionSet* const kSets[] = {&kNeon};
#else
#error "attention_ext has kernels for x86-64 and AArch64"
#endif

// -1 for a name that is no instruction set of this architecture: then every row says so.
int allowed_level() {
  static const int level = [] {
    const char* name = std::getenv("ATTENTION_EXT_ISA");
    if (name == nullptr || *name == '\0') return kSets[0]->level;
    for (const InstructionSet* set : kSets) {
      if (std::strcmp(set->name, name) == 0) return set->supported ? set->level : -1;
    }
    return -1;
  }();
  return level;
}

template <const InstructionSet& kSet>
const char* unavailable(const AttentionProblem& /*problem*/) {
  if (!kSet.supported) return kSet.missing;
  if (allowed_level() < 0) return "ATTENTION_EXT_ISA names no instruction set of this CPU";
  if (kSet.level > allowed_level()) return "excluded by ATTENTION_EXT_ISA";
  return nullptr;
}

template <const InstructionSet& kSet>
const char* not_decoding(const AttentionProblem& problem) {
  static_assert(kFewQueries == 8, "the reasons below name it");
  if (problem.dropout_p > 0) return "has no dropout";
  if (problem.max_seqlen_q > kFewQueries) {
    return problem.cu_seqlens_q ? "serves sequences of at most 8 queries, and of this call those alone"
                                : "serves at most 8 queries a sequence";
  }
  return unavailable<kSet>(problem);
}

template <const char* (*kReason)(const AttentionProblem&)>
const char* without_score_mod(const AttentionProblem& problem) {
  return problem.score_mod ? "has no compiled score_mod" : kReason(problem);
}

#if defined(__x86_64__)
const char* not_bfloat16(const AttentionProblem& problem) {
  return problem.dtype == DType::kBFloat16 ? unavailable<kAvx512Bf16>(problem) : "serves bfloat16 only";
}

const CpuKernel kKernels[] = {
    {"avx512/decode", Pass::kForward, without_score_mod<not_decoding<kAvx512>>, kAvx512Unit.decode},
    {"avx512_bf16/forward", Pass::kForward, not_bfloat16, kAvx512Bf16Unit.forward},
    {"avx512_bf16/backward", Pass::kBackward, not_bfloat16, kAvx512Bf16Unit.backward},
    {"avx512_bf16/weights", Pass::kWeights, without_score_mod<not_bfloat16>, kAvx512Bf16Unit.weights},
    {"avx512_bf16/jvp", Pass::kJvp, without_score_mod<not_bfloat16>, kAvx512Bf16Unit.jvp},
    {"avx512_bf16/double_backward", Pass::kDoubleBackward, without_score_mod<not_bfloat16>,
     kAvx512Bf16Unit.double_backward},
    {"avx512/forward", Pass::kForward, unavailable<kAvx512>, kAvx512Unit.forward},
    {"avx512/backward", Pass::kBackward, unavailable<kAvx512>, kAvx512Unit.backward},
    {"avx512/weights", Pass::kWeights, without_score_mod<unavailable<kAvx512>>, kAvx512Unit.weights},
    {"avx512/jvp", Pass::kJvp, without_score_mod<unavailable<kAvx512>>, kAvx512Unit.jvp},
    {"avx512/double_backward", Pass::kDoubleBackward, without_score_mod<unavailable<kAvx512>>,
     kAvx512Unit.double_backward},
    {"avx2/decode", Pass::kForward, without_score_mod<not_decoding<kAvx2>>, kAvx2Unit.decode},
    {"avx2/forward", Pass::kForward, unavailable<kAvx2>, kAvx2Unit.forward},
    {"avx2/backward", Pass::kBackward, unavailable<kAvx2>, kAvx2Unit.backward},
    {"avx2/weights", Pass::kWeights, without_score_mod<unavailable<kAvx2>>, kAvx2Unit.weights},
    {"avx2/jvp", Pass::kJvp, without_score_mod<unavailable<kAvx2>>, kAvx2Unit.jvp},
    {"avx2/double_backward", Pass::kDoubleBackward, without_score_mod<unavailable<kAvx2>>, kAvx2Unit.double_backward},
    {"baseline/decode", Pass::kForward, without_score_mod<not_decoding<kBaseline>>, kBaselineUnit.decode},
    {"baseline/forward", Pass::kForward, unavailable<kBaseline>, kBaselineUnit.forward},
    {"baseline/backward", Pass::kBackward, unavailable<kBaseline>, kBaselineUnit.backward},
    {"baseline/weights", Pass::kWeights, without_score_mod<unavailable<kBaseline>>, kBaselineUnit.weights},
    {"baseline/jvp", Pass::kJvp, without_score_mod<unavailable<kBaseline>>, kBaselineUnit.jvp},
    {"baseline/double_backward", Pass::kDoubleBackward, without_score_mod<unavailable<kBaseline>>,
     kBaselineUnit.double_backward},
};
#else
const CpuKernel kKernels[] = {
    {"neon/decode", Pass::kForward, without_score_mod<not_decoding<kNeon>>, kNeonUnit.decode},
    {"neon/forward", Pass::kForward, unavailable<kNeon>, kNeonUnit.forward},
    {"neon/backward", Pass::kBackward, unavailable<kNeon>, kNeonUnit.backward},
    {"neon/weights", Pass::kWeights, without_score_mod<unavailable<kNeon>>, kNeonUnit.weights},
    {"neon/jvp", Pass::kJvp, without_score_mod<unavailable<kNeon>>, kNeonUnit.jvp},
    {"neon/double_backward", Pass::kDoubleBackward, without_score_mod<unavailable<kNeon>>, kNeonUnit.double_backward},
};
#endif

std::vector<CpuKernel>& rows() {
  static std::vector<CpuKernel> all(std::begin(kKernels), std::end(kKernels));
  return all;
}

}  // namespace

std::span<const CpuKernel> cpu_kernels() { return rows(); }

void add_cpu_kernels(std::span<const CpuKernel> more) { rows().insert(rows().end(), more.begin(), more.end()); }

const CpuKernel* select_cpu_kernel(Pass pass, const AttentionProblem& problem, const char* forced) {
  for (const CpuKernel& kernel : cpu_kernels()) {
    const bool wanted = forced != nullptr ? std::strcmp(forced, kernel.name) == 0 : !kernel.on_request;
    if (kernel.pass != pass || !wanted) continue;
    if (kernel.why_not(problem) == nullptr) return &kernel;
  }
  return nullptr;
}

const char* cpu_instruction_set() {
  for (const InstructionSet* set : kSets) {
    if (set->supported && set->level <= allowed_level()) return set->name;
  }
  return "none";
}

}  // namespace attention_ext
