#include "gpu/units/backward_tf32.cu"
