#define HERD_KERNELS kQuantizeAvx512
#include "quantize_kernels.h"
