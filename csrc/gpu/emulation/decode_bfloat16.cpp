#include "gpu/units/decode_bfloat16.cu"
