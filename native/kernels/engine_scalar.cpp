#define HERD_KERNELS kEngineScalar
#include "engine_kernels.h"
