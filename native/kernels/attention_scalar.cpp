#define HERD_KERNELS kAttentionScalar
#define HERD_LANES 4
#define HERD_ACCUMULATORS 8
#include "attention_kernels.h"
