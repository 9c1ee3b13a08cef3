#include "gpu/units/forward_tf32.cu"
