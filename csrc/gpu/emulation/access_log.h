// Who read and wrote shared memory since the last barrier. Nothing else orders accesses of different threads, so that
// two of them to one place, one a write, are an error unless a barrier lies between: whatever the values, and in
// whatever order the threads ran.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace attention_ext::emulation {

class AccessLog {
 public:
  static constexpr int kWholeWarp = -1;  // for `thread`: all threads of a warp at once

  // Nothing has been written yet.
  void begin_block(size_t bytes);
  void barrier() { ++epoch_; }

  // Of bytes from `begin` on. Each returns null, or the fault of the access.
  const char* read(size_t begin, size_t bytes, int thread);
  const char* write(size_t begin, size_t bytes, int thread);
  // An asynchronous copy writes at any time between the two.
  const char* begin_copy(size_t begin, size_t bytes, int thread);
  void end_copy(size_t begin, size_t bytes, int thread);

 private:
  static constexpr size_t kGranule = 2;       // bytes, the smallest number
  static constexpr uint32_t kInFlight = ~0u;  // an epoch of writes
  static constexpr int kMany = -2;            // readers

  struct Granule {
    uint32_t written = 0, read = 0;  // the epochs of the last write and read
    int16_t writer = 0, reader = 0;
  };

  std::vector<Granule> granules_;
  int64_t in_flight_ = 0;                 // copies
  uint32_t epoch_ = 0, first_epoch_ = 0;  // barriers, over all blocks; first_epoch_ is the block's
};

}  // namespace attention_ext::emulation
