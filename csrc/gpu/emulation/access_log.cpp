#include "gpu/emulation/access_log.h"

#include <algorithm>

namespace attention_ext::emulation {

void AccessLog::begin_block(size_t bytes) {
  if (in_flight_ > 0) granules_.clear();  // a block has failed
  in_flight_ = 0;
  if (granules_.size() < bytes / kGranule) granules_.resize(bytes / kGranule);
  first_epoch_ = ++epoch_;
}

const char* AccessLog::read(size_t begin, size_t bytes, int thread) {
  for (size_t i = begin / kGranule; i < (begin + bytes) / kGranule; ++i) {
    Granule& x = granules_[i];
    if (x.written == kInFlight) return "reads shared memory that a copy may not have reached yet";
    if (x.written < first_epoch_) return "reads shared memory that nothing has written";
    if (x.written == epoch_ && x.writer != thread)
      return "reads shared memory that another thread wrote, without a barrier";
    x.reader = static_cast<int16_t>(x.read == epoch_ && x.reader != thread ? kMany : thread);
    x.read = epoch_;
  }
  return nullptr;
}

const char* AccessLog::write(size_t begin, size_t bytes, int thread) {
  for (size_t i = begin / kGranule; i < (begin + bytes) / kGranule; ++i) {
    Granule& x = granules_[i];
    if (x.written == kInFlight) return "writes shared memory that a copy may not have reached yet";
    if (x.written == epoch_ && x.writer != thread)
      return "writes shared memory that another thread wrote, without a barrier";
    if (x.read == epoch_ && x.reader != thread)
      return "writes shared memory that another thread read, without a barrier";
    x.written = epoch_;
    x.writer = static_cast<int16_t>(thread);
  }
  return nullptr;
}

const char* AccessLog::begin_copy(size_t begin, size_t bytes, int thread) {
  const char* wrong = write(begin, bytes, thread);
  ++in_flight_;
  for (size_t i = begin / kGranule; i < (begin + bytes) / kGranule; ++i) granules_[i].written = kInFlight;
  return wrong;
}

void AccessLog::end_copy(size_t begin, size_t bytes, int thread) {
  --in_flight_;
  for (size_t i = begin / kGranule; i < (begin + bytes) / kGranule; ++i) {
    granules_[i].written = epoch_;
    granules_[i].writer = static_cast<int16_t>(thread);
  }
}

}  // namespace attention_ext::emulation
