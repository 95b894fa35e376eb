#define HERD_KERNELS kAttentionAvx512Bf16
#define HERD_LANES 16
#define HERD_ACCUMULATORS 16
#define HERD_BF16
#include "attention_kernels.h"
