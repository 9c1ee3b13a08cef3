#include "gpu/units/weights_float16.cu"
