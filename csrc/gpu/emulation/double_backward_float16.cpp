#include "gpu/units/double_backward_float16.cu"
