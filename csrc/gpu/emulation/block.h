// One CUDA block on one CPU thread: a fiber for each of its threads, and the places where they meet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gpu/emulation/access_log.h"
#include "gpu/emulation/tensor_core.h"

namespace attention_ext::emulation {

class Block {
 public:
  // Runs body(argument) on every thread of a block. Throws where threads wait for each other in vain.
  static void run(int64_t index, int threads, size_t shared_bytes, void* argument, void (*body)(void*));

  int thread() const { return thread_; }
  int64_t index() const { return index_; }
  char* shared_memory() { return shared_; }
  const TensorCore& tensor_core() const { return tensor_core_; }

  void barrier();
  // All lanes of a warp arrive with an argument each; the last one calls together(arguments by lane).
  void collective(const char* name, void* argument, void (*together)(void* const*));

  void copy_async(void* to, const void* from, int bytes);
  void commit_copies();
  void wait_copies(int pending);

  // Of `bytes` in shared memory, aligned to their number; AccessLog checks them. `thread` may be its kWholeWarp.
  void read_shared(const char* name, const void* pointer, int bytes, int thread);
  void write_shared(const char* name, const void* pointer, int bytes);

  Block();

 private:
  static constexpr int kMostThreads = 1024, kLanes = 32;
  static constexpr size_t kStackBytes = 256 << 10;
  enum class Schedule : uint8_t { kAscending, kDescending, kRandom };

  struct Copy {
    char* to;
    const char* from;
    int bytes, group;
  };
  struct Fiber {
    void* stack_pointer = nullptr;
    const char* waits_at = nullptr;  // null while it can run
    bool done = false;
    int group = 0;  // of copies, the one not yet committed
    std::vector<Copy> copies;
  };
  struct Warp {
    int arrived = 0;
    void* arguments[kLanes];
  };

  static void start();
  void prepare(int64_t index, int threads, size_t shared_bytes);
  void set_ready(int thread, bool ready);
  int next_ready();
  void leave();  // lets another fiber run, until this one may go on
  void switch_to(void*& keep, void* stack_pointer);
  [[noreturn]] void fail(const std::string& error);
  // Where in shared memory.
  size_t offset_of(const char* name, const void* pointer, int bytes);
  void expect(const char* name, size_t offset, const char* wrong);
  std::string waiting() const;

  int64_t index_ = 0;
  int thread_ = 0, threads_ = 0, at_barrier_ = 0, done_ = 0;
  Schedule schedule_ = Schedule::kAscending;
  TensorCore tensor_core_ = kSm80;
  AccessLog log_;
  uint32_t random_ = 1;
  uint64_t ready_[kMostThreads / 64] = {};
  Fiber fibers_[kMostThreads];
  Warp warps_[kMostThreads / kLanes];
  std::unique_ptr<char[]> stacks_, memory_;
  size_t stack_count_ = 0, memory_bytes_ = 0, shared_bytes_ = 0;
  char* shared_ = nullptr;
  void* argument_ = nullptr;
  void (*body_)(void*) = nullptr;
  void* main_stack_ = nullptr;
  std::string error_;
};

extern thread_local Block* current;

}  // namespace attention_ext::emulation
