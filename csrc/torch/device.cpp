#include "torch/device.h"

#include <atomic>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <iterator>

namespace attention_ext {

namespace {

std::atomic<const char*> forced_kernels[std::size(kPassNames)];
std::atomic<int64_t> call_counts[std::size(kPassNames)];

constexpr int64_t kMostKeyParts = 1024;

// -1 where the variable holds anything else than a number of parts.
int64_t key_parts_of_environment() {
  const char* const text = std::getenv("ATTENTION_EXT_KEY_PARTS");
  if (text == nullptr || *text == '\0') return 0;
  const char* const end = text + std::strlen(text);
  int64_t parts = 0;
  const auto [stop, error] = std::from_chars(text, end, parts);
  return error == std::errc() && stop == end && parts >= 1 && parts <= kMostKeyParts ? parts : -1;
}

std::atomic<int64_t> chosen_key_parts{key_parts_of_environment()};

std::vector<Device>& registered_devices() {
  static std::vector<Device> devices;
  return devices;
}

}  // namespace

Pass pass_of(std::string_view name) {
  for (size_t i = 0; i < std::size(kPassNames); ++i) {
    if (name == kPassNames[i]) return static_cast<Pass>(i);
  }
  TORCH_CHECK(false, "attention_ext: expected a pass to be one of ", at::ArrayRef<const char*>(kPassNames), ", got ",
              name);
}

RegisterDevice::RegisterDevice(const Device& device) { registered_devices().push_back(device); }

const std::vector<Device>& devices() { return registered_devices(); }

const Device& device_for(c10::DeviceType type) {
  for (const Device& device : devices()) {
    if (device.type == type) return device;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(false, "attention_ext was built without kernels for ", type);
}

std::string explain_kernels(c10::DeviceType device, Pass pass, const AttentionProblem& problem) {
  const char* forced = forced_kernel(pass);
  bool is_chosen = false;
  std::string text;
  for (const KernelRow& row : device_for(device).kernels()) {
    if (row.pass != pass) continue;
    const char* reason = row.why_not(problem);
    const bool may_serve = !reason && (!forced || std::strcmp(forced, row.name) == 0);
    text += std::string(row.name) + ": " +
            (may_serve && !is_chosen ? "chosen"
             : reason                ? reason
                                     : "would serve") +
            "\n";
    is_chosen |= may_serve;
  }
  return text;
}

void force_kernel(Pass pass, const std::string& name) {
  const char* found = nullptr;
  for (const Device& device : devices()) {
    for (const KernelRow& row : device.kernels()) {
      if (row.pass == pass && name == row.name) found = row.name;
    }
  }
  TORCH_CHECK(found || name.empty(), "attention_ext: expected the name of a kernel of this pass, got \"", name, "\"");
  forced_kernels[static_cast<int>(pass)] = found;
}

const char* forced_kernel(Pass pass) { return forced_kernels[static_cast<int>(pass)].load(std::memory_order_relaxed); }

void set_key_parts(int64_t parts) {
  TORCH_CHECK(parts >= 0 && parts <= kMostKeyParts, "attention_ext: expected the number of key parts to be from 1 to ",
              kMostKeyParts, ", or 0 to leave it to the kernel, got ", parts);
  chosen_key_parts = parts;
}

int64_t key_parts() {
  const int64_t parts = chosen_key_parts.load(std::memory_order_relaxed);
  TORCH_CHECK(parts >= 0, "attention_ext: expected ATTENTION_EXT_KEY_PARTS to be a number from 1 to ", kMostKeyParts,
              ", got \"", std::getenv("ATTENTION_EXT_KEY_PARTS"), "\"");
  return parts;
}

int64_t call_count(Pass pass) { return call_counts[static_cast<int>(pass)]; }

void count_call(Pass pass) { call_counts[static_cast<int>(pass)].fetch_add(1, std::memory_order_relaxed); }

}  // namespace attention_ext
