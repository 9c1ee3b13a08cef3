// The parts of the operators that differ between devices, and the choice of a kernel from a device's
// table: forced, explained and counted in one way.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

#include "core/kernel_table.h"

namespace attention_ext {

// By Pass.
constexpr const char* kPassNames[] = {"forward", "backward", "weights", "jvp", "double_backward"};

Pass pass_of(std::string_view name);

struct KernelRow {
  const char* name;
  Pass pass;
  std::function<const char*(const AttentionProblem&)> why_not;  // null, or the reason why it does not serve here
};

struct Device {
  c10::DeviceType type;
  // On the current stream where there are streams. Throws with every row's reason where no kernel serves the problem.
  void (*run)(Pass pass, const AttentionProblem& problem);
  std::vector<KernelRow> (*kernels)();  // best first
  int (*multiprocessors)();             // of the current GPU; 0 on a CPU
  int (*l2_bytes)();                    // likewise
};

// Each device that the library was built for registers itself when the library is loaded.
struct RegisterDevice {
  explicit RegisterDevice(const Device& device);
};

const std::vector<Device>& devices();
const Device& device_for(c10::DeviceType type);

// "avx512/forward: chosen", "neon/forward: needs ...", one line for each kernel of the pass.
std::string explain_kernels(c10::DeviceType device, Pass pass, const AttentionProblem& problem);

// From now on only this kernel is used for the pass; an empty name lifts it. For tests.
void force_kernel(Pass pass, const std::string& name);
const char* forced_kernel(Pass pass);  // or null

// From now on forward passes on a GPU cut the keys of every tile of queries into so many parts; 0 leaves the number to
// the kernel. Before, it is that of ATTENTION_EXT_KEY_PARTS. key_parts() raises where that is not a number from 1 to
// 1024.
void set_key_parts(int64_t parts);
int64_t key_parts();

// How often the operator of this pass has run in this process, on any device.
int64_t call_count(Pass pass);
void count_call(Pass pass);

}  // namespace attention_ext
