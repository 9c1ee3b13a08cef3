#include "gpu/units/forward_float64.cu"
