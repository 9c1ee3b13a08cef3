#include "gpu/units/jvp_float32.cu"
