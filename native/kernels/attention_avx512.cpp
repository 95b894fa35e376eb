#define HERD_KERNELS kAttentionAvx512
#define HERD_LANES 16
#define HERD_ACCUMULATORS 16
#include "attention_kernels.h"
