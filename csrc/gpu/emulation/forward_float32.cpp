#include "gpu/units/forward_float32.cu"
