#include "gpu/units/double_backward_float32.cu"
