#include "gpu/units/weights_float32.cu"
