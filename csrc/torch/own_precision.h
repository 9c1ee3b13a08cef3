// The precision of derivatives that are composed of torch's operators, also under autocast.
#pragma once

#include <ATen/autocast_mode.h>

namespace attention_ext {

// Operators called within it keep the dtypes of their arguments. Autocast is left on, with float32 to cast to, which
// changes no float32 and no float64: torch.func sends operators on to outer levels with the dispatch keys that these
// levels started with, so excluding autocast's key would hold for the innermost level only.
class OwnPrecision {
 public:
  explicit OwnPrecision(c10::DeviceType device) : device_(device) {
    if (!at::autocast::is_autocast_available(device)) return;
    autocast_dtype_ = at::autocast::get_autocast_dtype(device);
    at::autocast::set_autocast_dtype(device, at::kFloat);
  }
  ~OwnPrecision() {
    if (autocast_dtype_) at::autocast::set_autocast_dtype(device_, *autocast_dtype_);
  }
  OwnPrecision(const OwnPrecision&) = delete;
  OwnPrecision& operator=(const OwnPrecision&) = delete;

 private:
  c10::DeviceType device_;
  std::optional<at::ScalarType> autocast_dtype_;
};

}  // namespace attention_ext
