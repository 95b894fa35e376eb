#define HERD_KERNELS kAttentionAvx2
#define HERD_LANES 8
#define HERD_ACCUMULATORS 8
#include "attention_kernels.h"
