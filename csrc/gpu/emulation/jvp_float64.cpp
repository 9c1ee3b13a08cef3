#include "gpu/units/jvp_float64.cu"
