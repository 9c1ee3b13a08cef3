#include "gpu/units/forward_float16.cu"
