// Weights into GGUF's block formats, with the smallest squared error that a search over scales finds.
#pragma once

#include <cstdint>
#include <string>

namespace herd {

enum class BlockFormat { q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_xs };

// Weights of a block, and the bytes it takes. Throws std::invalid_argument for a name of no block format.
struct BlockSize {
  int weights, bytes;
};
BlockFormat block_format(const std::string& name);
BlockSize block_size(BlockFormat format);

// Encodes [rows, columns] weights, columns a multiple of the block; `importance` [columns] weighs the squared error of
// each column (null: all alike). Weights are finite. Returns false when some block's scale does not fit in float16.
bool quantize(BlockFormat format, const float* weights, std::int64_t rows, std::int64_t columns,
              const float* importance, std::uint8_t* out, int threads);

// One kernel set per instruction set, compiled from the same source: their results are equal, bit for bit.
struct QuantizeKernels {
  bool (*row)(BlockFormat format, const float* x, const float* importance, std::int64_t columns, std::uint8_t* out);
};
extern const QuantizeKernels kQuantizeScalar, kQuantizeAvx2, kQuantizeAvx512;

}  // namespace herd
