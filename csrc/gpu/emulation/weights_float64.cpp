#include "gpu/units/weights_float64.cu"
