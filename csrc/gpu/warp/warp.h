// All that a kernel may know of the machine: threads, shared memory, shuffles, matrix instructions, asynchronous
// copies. The same kernel is compiled by nvcc against PTX and by any C++ compiler against an emulation.
#pragma once

#if defined(__CUDACC__)
#include "gpu/warp/device.h"
#else
#include "gpu/warp/emulated.h"
#endif
