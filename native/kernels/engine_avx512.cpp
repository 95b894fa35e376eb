#define HERD_KERNELS kEngineAvx512
#include "engine_kernels.h"
