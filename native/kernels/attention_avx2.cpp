#define HERD_KERNELS kAttentionAvx2
#define HERD_LANES 8
#define HERD_ACCUMULATORS 12
#include "attention_kernels.h"
