#include "gpu/units/decode_float32.cu"
