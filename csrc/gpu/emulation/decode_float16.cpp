#include "gpu/units/decode_float16.cu"
