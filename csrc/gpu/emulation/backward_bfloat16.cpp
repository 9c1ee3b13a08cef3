#include "gpu/units/backward_bfloat16.cu"
