#include "gpu/units/decode_float64.cu"
