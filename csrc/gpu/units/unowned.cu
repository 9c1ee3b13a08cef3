#include "gpu/kernels/unowned.h"
#include "gpu/unit.h"

namespace attention_ext {

template <>
void add_clear_unowned<KernelPlan>(KernelPlan& plan, Pass pass, const AttentionProblem& p) {
  const auto add = [&]<class Problem>(const Problem&) {
    using Kernel = ClearUnowned<Problem>;
    if constexpr (!std::is_same_v<Problem, WeightsProblem>) add_launch<Kernel>(plan, Kernel::blocks(p));
  };
  with_problem(pass, add);
}

}  // namespace attention_ext
