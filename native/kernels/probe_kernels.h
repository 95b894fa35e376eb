// Loops that do nothing but what is measured.
#include "matmul_kernels.h"

namespace herd {
namespace {

std::uint64_t read(const std::uint8_t* p, std::int64_t bytes) {
  Words sums[4] = {};
  for (std::int64_t i = 0; i < bytes; i += 256) {
    fetch_ahead(p + i, 256);
    for (int j = 0; j < 4; ++j) {
      sums[j] += load<Words>(p + i + 64 * j);
    }
  }
  const Words total = sums[0] + sums[1] + sums[2] + sums[3];
  return total[0] + total[7] + total[15];
}

// Both return the operations done. One factor changes every round, so that no product is taken out of the loop, and the
// sums are looked at so that they are computed.
#if defined(__AVX512F__)
constexpr int kChains = 8;
#else
constexpr int kChains = 4;  // of vectors that take several registers
#endif

std::int64_t int8_products(std::int64_t rounds) {
  alignas(64) std::int8_t x[64];
  Codes codes;
  for (int i = 0; i < 64; ++i) x[i] = static_cast<std::int8_t>(i);
  codes = load<Codes>(x);
  Ints sums[kChains] = {};
  for (std::int64_t r = 0; r < rounds; ++r) {
    codes += 1;
#pragma GCC unroll 8
    for (int j = 0; j < kChains; ++j) sums[j] = add_products<4>(sums[j], codes & 15, x + 4 * j);
  }
  Ints total = sums[0];
  for (int j = 1; j < kChains; ++j) total += sums[j];
  return rounds * kChains * 128 + (total[0] == 1);
}

std::int64_t f32_products(std::int64_t rounds) {
  alignas(64) float x[16];
  for (int i = 0; i < 16; ++i) x[i] = 1.0f + static_cast<float>(i);
  Floats factor = load(x);
  Floats sums[kChains] = {};
  for (std::int64_t r = 0; r < rounds; ++r) {
    factor += 1.0f;
#pragma GCC unroll 8
    for (int j = 0; j < kChains; ++j) sums[j] += factor * x[j];
  }
  Floats total = sums[0];
  for (int j = 1; j < kChains; ++j) total += sums[j];
  return rounds * kChains * 32 + (total[0] == 1.0f);
}

// Of bfloat16: with products of its own, or those of 32 bits.
std::int64_t bf16_products(std::int64_t rounds) {
#if defined(__AVX512BF16__)
  constexpr int kBoth = 2 * kChains;
  alignas(64) std::uint32_t x[16];
  for (std::uint32_t i = 0; i < 16; ++i) x[i] = 0x3f803f80 + i;
  Words factor = load<Words>(x);
  Floats sums[kBoth] = {};
  for (std::int64_t r = 0; r < rounds; ++r) {
    factor += 1;
#pragma GCC unroll 16
    for (int j = 0; j < kBoth; ++j) sums[j] = add_pairs(sums[j], x[j], factor);
  }
  Floats total = sums[0];
  for (int j = 1; j < kBoth; ++j) total += sums[j];
  return rounds * kBoth * 64 + (total[0] == 1.0f);
#else
  return f32_products(rounds);
#endif
}

}  // namespace
}  // namespace herd
