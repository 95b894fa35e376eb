#define HERD_KERNELS kEngineAvx512Vnni
#include "engine_kernels.h"
