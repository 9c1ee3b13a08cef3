#include "gpu/units/double_backward_float64.cu"
