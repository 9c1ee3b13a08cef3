#include "gpu/units/simt.cu"
