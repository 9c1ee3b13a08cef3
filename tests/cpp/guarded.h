// Memory between two inaccessible pages. It ends where the second begins, so that an access past the end faults, also
// in vector code and without a sanitizer; the slack before it is filled with NaN, which is checked to be unchanged.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "check.h"

namespace attention_ext::test {

constexpr unsigned char kPoison = 0xFF;  // NaN in every floating type

class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    room_ = (bytes + page - 1) / page * page;
    mapped_ = room_ + 2 * page;
    void* base = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    start_ = static_cast<unsigned char*>(base) + page;
    base_ = base;
    if (room_ > 0) mprotect(start_, room_, PROT_READ | PROT_WRITE);
    poison();
    std::memset(start_, kPoison, slack());
  }
  Guarded(Guarded&& other) noexcept { *this = std::move(other); }
  Guarded& operator=(Guarded&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(start_, other.start_);
    std::swap(mapped_, other.mapped_);
    std::swap(room_, other.room_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Guarded() {
    if (base_ == nullptr) return;
    check(slack_is_unchanged(), "memory before a buffer was written");
    munmap(base_, mapped_);
  }

  void* data() const { return start_ + slack(); }
  size_t bytes() const { return bytes_; }
  void poison() { std::memset(data(), kPoison, bytes_); }

 private:
  size_t slack() const { return room_ - bytes_; }
  bool slack_is_unchanged() const {
    for (size_t i = 0; i < slack(); ++i) {
      if (start_[i] != kPoison) return false;
    }
    return true;
  }

  void* base_ = nullptr;
  unsigned char* start_ = nullptr;
  size_t mapped_ = 0, room_ = 0, bytes_ = 0;
};

}  // namespace attention_ext::test
