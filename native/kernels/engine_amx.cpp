#define HERD_AMX
#define HERD_KERNELS kEngineAmx
#include "engine_kernels.h"
