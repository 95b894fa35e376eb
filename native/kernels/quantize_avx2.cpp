#define HERD_KERNELS kQuantizeAvx2
#include "quantize_kernels.h"
