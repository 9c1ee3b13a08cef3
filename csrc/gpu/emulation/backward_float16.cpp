#include "gpu/units/backward_float16.cu"
