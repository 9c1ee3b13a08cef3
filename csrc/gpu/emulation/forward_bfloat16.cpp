#include "gpu/units/forward_bfloat16.cu"
