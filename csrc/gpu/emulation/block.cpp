#include "gpu/emulation/block.h"

#include <bit>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if !defined(__x86_64__)
#error "GPU kernels are emulated on x86-64 only: the switch between fibers is written for it"
#endif

// Keeps the registers that a call must keep on the stack, stores the stack pointer at *rdi and goes on at rsi.
asm(R"(
.text
.p2align 4
.type attention_ext_switch_stack, @function
attention_ext_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size attention_ext_switch_stack, .-attention_ext_switch_stack
)");

extern "C" void attention_ext_switch_stack(void** keep, void* stack_pointer);

namespace attention_ext::emulation {

namespace {

constexpr int kSavedRegisters = 6;
constexpr uint64_t kCanary = 0x5AFE57AC5AFE57ACu;  // at the far end of every stack
constexpr int kUnwritten = 0xFF;                   // NaN in every floating type
constexpr size_t kSharedAlignment = 128;
constexpr int kCopyBytes = 16;

const char* setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

}  // namespace

thread_local Block* current = nullptr;

Block::Block() = default;

void Block::run(int64_t index, int threads, size_t shared_bytes, void* argument, void (*body)(void*)) {
  static thread_local const auto block = std::make_unique<Block>();
  block->argument_ = argument;
  block->body_ = body;
  block->prepare(index, threads, shared_bytes);
  current = block.get();
  block->thread_ = block->next_ready();
  block->switch_to(block->main_stack_, block->fibers_[block->thread_].stack_pointer);
  if (!block->error_.empty()) throw std::runtime_error("attention_ext, emulated kernel: " + block->error_);
}

void Block::prepare(int64_t index, int threads, size_t shared_bytes) {
  index_ = index;
  threads_ = threads;
  at_barrier_ = done_ = 0;
  error_.clear();
  if (stack_count_ < static_cast<size_t>(threads)) {
    stack_count_ = static_cast<size_t>(threads);
    stacks_.reset(new char[stack_count_ * kStackBytes]);
  }
  if (memory_bytes_ < shared_bytes + kSharedAlignment) {
    memory_bytes_ = shared_bytes + kSharedAlignment;
    memory_.reset(new char[memory_bytes_]);
  }
  shared_bytes_ = shared_bytes;
  const auto address = reinterpret_cast<uintptr_t>(memory_.get());
  shared_ = memory_.get() + (kSharedAlignment - address % kSharedAlignment) % kSharedAlignment;
  std::memset(shared_, kUnwritten, shared_bytes);
  log_.begin_block(shared_bytes);
  const std::string name = setting("ATTENTION_EXT_SCHEDULE", "ascending");
  schedule_ = name == "random"       ? Schedule::kRandom
              : name == "descending" ? Schedule::kDescending
                                     : Schedule::kAscending;
  tensor_core_ = TensorCore::named(setting("ATTENTION_EXT_TENSOR_CORE", "sm_80"));
  random_ = static_cast<uint32_t>(index) * 2654435761u + 1;
  for (Warp& warp : warps_) warp.arrived = 0;
  for (int i = 0; i < threads; ++i) {
    char* stack = stacks_.get() + static_cast<size_t>(i) * kStackBytes;
    std::memcpy(stack, &kCanary, sizeof kCanary);
    // A function expects the stack 8 bytes off a multiple of 16, as the return address leaves it.
    char* const end = stack + kStackBytes;
    auto* top = reinterpret_cast<void**>(end - reinterpret_cast<uintptr_t>(end) % 16) - 1;
    *--top = reinterpret_cast<void*>(&Block::start);
    fibers_[i].stack_pointer = static_cast<void*>(top - kSavedRegisters);
    fibers_[i].waits_at = nullptr;
    fibers_[i].done = false;
    fibers_[i].group = 0;
    fibers_[i].copies.clear();
    set_ready(i, true);
  }
}

void Block::start() {
  Block& block = *current;
  block.body_(block.argument_);
  Fiber& fiber = block.fibers_[block.thread_];
  if (!fiber.copies.empty()) block.fail("ends with copies on their way, which could land at any time");
  fiber.done = true;
  ++block.done_;
  block.leave();
}

void Block::set_ready(int thread, bool ready) {
  const uint64_t bit = uint64_t{1} << (thread % 64);
  if (ready) {
    ready_[thread / 64] |= bit;
    fibers_[thread].waits_at = nullptr;
  } else {
    ready_[thread / 64] &= ~bit;
  }
}

// A thread that can run, or -1. Ascending and descending let one warp run as far ahead of the others as it can.
int Block::next_ready() {
  const int words = (threads_ + 63) / 64;
  if (schedule_ == Schedule::kDescending) {
    for (int w = words - 1; w >= 0; --w) {
      if (ready_[w]) return w * 64 + 63 - std::countl_zero(ready_[w]);
    }
    return -1;
  }
  random_ = random_ * 1664525u + 1013904223u;
  const int turn = schedule_ == Schedule::kRandom ? static_cast<int>(random_ >> 8) % 64 : 0;
  const int first = schedule_ == Schedule::kRandom ? static_cast<int>(random_ >> 16) % words : 0;
  for (int i = 0; i < words; ++i) {
    const int w = (first + i) % words;
    if (ready_[w]) return w * 64 + (std::countr_zero(std::rotr(ready_[w], turn)) + turn) % 64;
  }
  return -1;
}

void Block::switch_to(void*& keep, void* stack_pointer) { attention_ext_switch_stack(&keep, stack_pointer); }

void Block::leave() {
  const int from = thread_;
  set_ready(from, fibers_[from].waits_at == nullptr && !fibers_[from].done);
  const int next = next_ready();
  if (next == from) return;
  if (next < 0 && done_ < threads_) fail("threads wait for each other in vain: " + waiting());
  thread_ = next;
  switch_to(fibers_[from].stack_pointer, next < 0 ? main_stack_ : fibers_[next].stack_pointer);
}

void Block::fail(const std::string& error) {
  error_ = "block " + std::to_string(index_) + ", thread " + std::to_string(thread_) + ": " + error;
  std::memset(ready_, 0, sizeof ready_);
  void* abandoned = nullptr;
  switch_to(abandoned, main_stack_);
  std::abort();
}

std::string Block::waiting() const {
  const auto state = [&](int i) {
    const Fiber& fiber = fibers_[i];
    return fiber.done ? "has ended" : fiber.waits_at ? fiber.waits_at : "runs";
  };
  std::string text;
  for (int i = 0; i < threads_; ++i) {
    if (i > 0 && std::strcmp(state(i), state(i - 1)) == 0) continue;
    text += " from thread " + std::to_string(i) + " on: " + state(i) + ";";
  }
  return text;
}

void Block::barrier() {
  fibers_[thread_].waits_at = "barrier";
  if (++at_barrier_ == threads_) {
    at_barrier_ = 0;
    log_.barrier();
    for (int i = 0; i < threads_; ++i) set_ready(i, true);
  }
  leave();
}

void Block::collective(const char* name, void* argument, void (*together)(void* const*)) {
  const int first = thread_ / kLanes * kLanes;
  Warp& warp = warps_[thread_ / kLanes];
  uint64_t stack_end;
  std::memcpy(&stack_end, stacks_.get() + static_cast<size_t>(thread_) * kStackBytes, sizeof stack_end);
  if (stack_end != kCanary) fail("the stack of the fiber is too small");
  warp.arguments[thread_ - first] = argument;
  fibers_[thread_].waits_at = name;
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    for (int i = first; i < first + kLanes; ++i) {
      if (std::strcmp(fibers_[i].waits_at, name) != 0) fail("lanes of a warp meet at different places: " + waiting());
    }
    together(warp.arguments);
    for (int i = first; i < first + kLanes; ++i) set_ready(i, true);
  }
  leave();
}

size_t Block::offset_of(const char* name, const void* pointer, int bytes) {
  const char* address = static_cast<const char*>(pointer);
  if (address < shared_ || address + bytes > shared_ + shared_bytes_) fail(std::string(name) + " out of shared memory");
  if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) != 0)
    fail(std::string(name) + " misaligned");
  return static_cast<size_t>(address - shared_);
}

void Block::expect(const char* name, size_t offset, const char* wrong) {
  if (wrong) fail(std::string(name) + " " + wrong + ", at byte " + std::to_string(offset));
}

void Block::read_shared(const char* name, const void* pointer, int bytes, int thread) {
  const size_t offset = offset_of(name, pointer, bytes);
  expect(name, offset, log_.read(offset, static_cast<size_t>(bytes), thread));
}

void Block::write_shared(const char* name, const void* pointer, int bytes) {
  const size_t offset = offset_of(name, pointer, bytes);
  expect(name, offset, log_.write(offset, static_cast<size_t>(bytes), thread_));
}

void Block::copy_async(void* to, const void* from, int bytes) {
  const size_t offset = offset_of("cp.async", to, kCopyBytes);
  if (reinterpret_cast<uintptr_t>(from) % kCopyBytes != 0) fail("cp.async from a misaligned address");
  expect("cp.async", offset, log_.begin_copy(offset, kCopyBytes, thread_));
  std::memset(to, kUnwritten, kCopyBytes);
  Fiber& fiber = fibers_[thread_];
  fiber.copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, fiber.group});
}

void Block::commit_copies() { ++fibers_[thread_].group; }

void Block::wait_copies(int pending) {
  Fiber& fiber = fibers_[thread_];
  size_t landed = 0;
  for (; landed < fiber.copies.size() && fiber.copies[landed].group < fiber.group - pending; ++landed) {
    const Copy& copy = fiber.copies[landed];
    std::memset(copy.to, 0, kCopyBytes);
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    log_.end_copy(static_cast<size_t>(copy.to - shared_), kCopyBytes, thread_);
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

}  // namespace attention_ext::emulation
