#include "gpu/units/weights_bfloat16.cu"
