// What this machine can do at most, to compare the engine with: memory read, and products of bytes in registers.
#pragma once

#include <cstdint>

namespace herd {

// Bytes per second that `threads` threads read from a block of `bytes` together, at the best of `rounds` attempts.
double read_bandwidth(std::int64_t bytes, int threads, int rounds);

// Multiplications and additions per second in the inner step of the quantised products, of 32-bit ones, and of those of
// bfloat16, with all operands in registers or the nearest cache.
struct ProductPeak {
  double int8, f32, bf16;
};
ProductPeak product_peak(int threads);

}  // namespace herd
