// The engine's kernel set of one instruction set: the including file defines HERD_KERNELS, its name.
#include "decoder_kernels.h"
#include "matmul_kernels.h"
#include "probe_kernels.h"

namespace herd {
const EngineKernels HERD_KERNELS = {inputs_of, multiply,      put_block,    largest_of,   read_row, normalise,
                                    add_dots,  swiglu,        rotate,       put,          attend,   log_probability,
                                    read,      int8_products, f32_products, bf16_products};
}
