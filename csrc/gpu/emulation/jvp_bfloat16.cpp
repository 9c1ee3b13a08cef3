#include "gpu/units/jvp_bfloat16.cu"
