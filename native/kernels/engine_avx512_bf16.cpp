#define HERD_KERNELS kEngineAvx512Bf16
#include "engine_kernels.h"
