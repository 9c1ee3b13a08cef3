#include "gpu/units/unowned.cu"
