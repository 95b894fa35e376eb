#define HERD_KERNELS kEngineAvx2
#include "engine_kernels.h"
