#include "gpu/units/jvp_float16.cu"
