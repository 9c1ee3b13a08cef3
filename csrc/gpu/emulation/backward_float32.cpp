#include "gpu/units/backward_float32.cu"
