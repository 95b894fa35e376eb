#define HERD_KERNELS kQuantizeScalar
#include "quantize_kernels.h"
