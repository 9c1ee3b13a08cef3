#include "gpu/units/backward_float64.cu"
