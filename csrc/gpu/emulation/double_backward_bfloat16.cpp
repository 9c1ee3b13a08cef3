#include "gpu/units/double_backward_bfloat16.cu"
