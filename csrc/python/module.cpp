// attention_ext._C: introspection of the operator library. No operators here, so no Python there.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "build_facts.h"
#include "torch/device.h"
#include "torch/score_mods.h"

namespace py = pybind11;

namespace attention_ext {

namespace {

constexpr std::pair<const char*, DType> kDTypes[] = {{"float32", DType::kFloat32},
                                                     {"bfloat16", DType::kBFloat16},
                                                     {"float16", DType::kFloat16},
                                                     {"float64", DType::kFloat64}};
// One query against some keys: every kernel can serve this unless the dtype or the CPU is in its way.
const char* why_not(const KernelRow& row, DType dtype) {
  return with_problem(row.pass, [&](auto problem) {
    problem.batch = problem.heads = problem.kv_heads = problem.seqlen_q = problem.max_seqlen_q = 1;
    problem.seqlen_k = problem.max_seqlen_k = 128;
    problem.head_dim = problem.head_dim_v = 64;
    problem.dtype = dtype;
    return row.why_not(problem);
  });
}

py::dict described(const Device& device, const KernelRow& kernel) {
  py::dict reasons;
  bool available = false;
  for (const auto& [name, dtype] : kDTypes) {
    const char* reason = why_not(kernel, dtype);
    available |= reason == nullptr;
    reasons[name] = reason;
  }
  const std::string name = kernel.name;
  py::dict row;
  row["name"] = name;
  row["pass"] = kPassNames[static_cast<int>(kernel.pass)];
  row["isa"] = name.substr(0, name.find('/'));
  row["device"] = c10::DeviceTypeName(device.type, /*lower_case=*/true);
  row["available"] = available;
  row["why_not"] = reasons;
  return row;
}

py::list kernels() {
  py::list rows;
  for (const Device& device : devices()) {
    for (const KernelRow& kernel : device.kernels()) rows.append(described(device, kernel));
  }
  return rows;
}

py::dict build_info() {
  py::dict info;
  info["version"] = build_facts::kVersion;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = build_facts::kCompiler;
  info["flags"] = build_facts::kFlags;
  info["cplusplus"] = __cplusplus;
  info["commit"] = build_facts::kCommit;
  info["dirty"] = build_facts::kDirty;
  info["cuda"] = build_facts::kCuda;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("kernels", kernels,
        "Rows of the kernel table, best first: name, pass, isa, device, available, and why_not, which gives for each "
        "dtype the reason why the kernel does not serve it here, or None.");
  m.def("instruction_set", cpu_instruction_set,
        "The widest instruction set in use: the CPU's, or what ATTENTION_EXT_ISA limits it to; \"none\" if that names "
        "none that the CPU has.");
  m.def("build_info", build_info, "The version, and the torch, compiler, flags and commit that it was built with.");
  m.def(
      "call_count", [](const std::string& pass) { return call_count(pass_of(pass)); }, py::arg("pass"),
      "How often the operator of a pass has computed in this process.");
  m.def(
      "set_key_parts", set_key_parts, py::arg("parts"),
      "Forward passes on a GPU, or on its emulation, cut the keys of every tile of queries into so many parts, in the "
      "whole process; 0 leaves the number to the kernel. For tests: users set ATTENTION_EXT_KEY_PARTS.");
  m.def("key_parts", key_parts, "The number set, by ATTENTION_EXT_KEY_PARTS or set_key_parts; 0 without one.");
  m.def(
      "register_score_mod",
      [](const std::string& key, uintptr_t function, uintptr_t gradient, bool is_double, int64_t captured) {
        register_score_mod(key, {reinterpret_cast<ScoreModFunction>(function),
                                 reinterpret_cast<ScoreModGradient>(gradient), is_double, captured});
      },
      py::arg("key"), py::arg("function"), py::arg("gradient"), py::arg("is_double"), py::arg("captured"),
      "Gives the operators of flex_attention the compiled functions of a score_mod, by their addresses; gradient is 0 "
      "where the derivative is 1.");
  m.def(
      "force_kernel", [](const std::string& pass, const std::string& name) { force_kernel(pass_of(pass), name); },
      py::arg("pass"), py::arg("name"),
      "Uses only the kernel of this name for a pass, in the whole process; an empty name lifts that. For tests.");
}

}  // namespace attention_ext
