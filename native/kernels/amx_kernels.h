// Products of one strip in AMX tiles: of quantised weights with eight rows and more, of bfloat16 ones with all rows.
//
// A tile product of bytes gives a block's exact sums of eight rows at once; what follows in floating point is what
// quantised_strip does, in the same order, so that a row's bits are the same there and here. One of bfloat16 adds up a
// block's even and its odd columns, and then both to what was there: an order of its own, so that one row takes the
// same way as many.
#pragma once

#include "slab_kernels.h"

namespace herd {
namespace {

// Registers: 0 to 3 have sums, two groups of rows for each of two products in turn, 4 and 5 inputs, 6 and 7 weights.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
constexpr TileShapes tile_shapes(int parts) {  // of a block, each with scales of its own
  TileShapes shapes;
  for (int t = 0; t < 8; ++t) {
    shapes.rows[t] = static_cast<std::uint8_t>(t < 6 ? 8 : 8 / parts);
    shapes.row_bytes[t] = static_cast<std::uint16_t>(t == 4 || t == 5 ? 32 / parts : 64);
  }
  return shapes;
}

// Not the compiler's intrinsics: GCC's do not say that they read memory, so that stores before them may come too late.
inline void set_shapes(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }
template <int To>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(To));
}
template <int To>
inline void load_tile(const void* p) {  // of rows 64 bytes apart, as all are
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(std::int64_t{64}), "i"(To) : "memory");
}
template <int From>
inline void store_tile(void* p) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(std::int64_t{64}), "i"(From) : "memory");
}
template <int To, int Inputs, int Weights>
inline void add_tile_products() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(To), "i"(Inputs), "i"(Weights));
}

template <int To, int Inputs, int Weights>
inline void add_bf16_products() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(To), "i"(Inputs), "i"(Weights));
}

// Whole sums of one or two groups of eight rows.
template <int Turn, int Groups>
inline void tile_products(const Codes* weights, const std::int8_t* x, std::int64_t next, Ints* sums) {
  load_tile<6 + Turn>(weights);
  clear_tile<2 * Turn>();
  load_tile<4>(x);
  add_tile_products<2 * Turn, 4, 6 + Turn>();
  if constexpr (Groups == 2) {
    clear_tile<2 * Turn + 1>();
    load_tile<5>(x + next);
    add_tile_products<2 * Turn + 1, 5, 6 + Turn>();
    store_tile<2 * Turn + 1>(sums + 8);
  }
  store_tile<2 * Turn>(sums);
}

// y += the products of a few blocks. The second group of rows lies `next` blocks behind the first.
template <class F, int Groups>
void add_blocks(const Unpacked<F>& w, int count, const Int8Block* x, std::int64_t next, Floats* y) {
  constexpr int kParts = F::kGroups, kRows = 8 * Groups;
  const int products = kParts * count;
  Ints sums[2][kRows];
  const auto start = [&](int i) {
    const Codes* weights = w.codes[i / kParts] + 8 / kParts * (i % kParts);
    const std::int8_t* codes = x[8 * (i / kParts)].codes + 16 * (i % kParts);
    const auto bytes = next * static_cast<std::int64_t>(sizeof(Int8Block));
    i % 2 ? tile_products<1, Groups>(weights, codes, bytes, sums[1])
          : tile_products<0, Groups>(weights, codes, bytes, sums[0]);
  };
  Floats acc[kRows];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) acc[m] = y[m];
  start(0);
  for (int i = 0; i < products; ++i) {
    if (i + 1 < products) start(i + 1);  // a tile product takes some 50 cycles: the next one runs beside these sums
    const int b = i / kParts, part = i % kParts, sum = kParts == 1 ? 0 : part + 1;
    const Floats scale = w.scale[b][part], offset = F::kOffset ? w.offset[b][part] : Floats{};
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Int8Block& in = x[m / 8 * next + 8 * b + m % 8];
      acc[m] += convert(sums[i % 2][m]) * (scale * in.scale);
      if (F::kOffset) acc[m] -= offset * in.sum[sum];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) y[m] = acc[m];
}

// As in_slabs. Zero points are taken off the codes, once for all rows: Σ(code - zero)·x is minus·zero + Σ code·x, which
// the other kernels add up, and both are exact.
template <class F, class Put>
int tiled_strip(const std::uint8_t* strip, const Panel& x, const Put& put) {
  static_assert(F::kZero <= 128 && (1 << F::kBits) - 1 - F::kZero <= 127);
  static constexpr TileShapes kShapes = tile_shapes(F::kGroups);
  if (x.rows < 8) return 0;
  set_shapes(kShapes);
  const int rows = in_slabs<F, F::kZero>(
      strip, x, put, [&x](const Unpacked<F>& w, int blocks, const Int8Block* in, int count, Floats* sums) {
        int m = 0;
        for (; m + 16 <= count; m += 16) add_blocks<F, 2>(w, blocks, in + m * x.blocks, 8 * x.blocks, sums + m);
        if (m < count) add_blocks<F, 1>(w, blocks, in + m * x.blocks, 0, sums + m);
      });
  release_tiles();  // a thread whose tiles are in use takes longer to switch to
  return rows;
}

// bfloat16: a tile of weights is one as it lies in memory, 16 pairs of columns of 16 rows. Registers: 0 to 3 have the
// sums of a group of rows each, 4 and 5 inputs, 6 weights.
constexpr TileShapes bf16_tile_shapes(int rows) {
  TileShapes shapes;
  for (int t = 0; t < 7; ++t)
    shapes.rows[t] = static_cast<std::uint8_t>(t < 6 ? rows : kTile / 2), shapes.row_bytes[t] = 64;
  return shapes;
}

// y = the products of up to four groups of `rows` rows.
template <int Groups>
void multiply_bf16(const std::uint8_t* w, const std::uint8_t* x, int rows, std::int64_t blocks, Floats* y) {
  constexpr int kBytes = tile_size(Format::bf16).tile;
  const std::int64_t block = rows * block_bytes(Inputs::bf16), next = blocks * block;
  clear_tile<0>();
  if constexpr (Groups == 4) clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
  for (std::int64_t b = 0; b < blocks; ++b, w += kBytes, x += block) {
    fetch_ahead(w, kBytes);
    load_tile<6>(w);
    load_tile<4>(x);
    add_bf16_products<0, 4, 6>();
    if constexpr (Groups == 4) {
      load_tile<5>(x + next);
      add_bf16_products<1, 5, 6>();
      load_tile<4>(x + 2 * next);
      add_bf16_products<2, 4, 6>();
      load_tile<5>(x + 3 * next);
      add_bf16_products<3, 5, 6>();
    }
  }
  store_tile<0>(y);
  if constexpr (Groups == 4) store_tile<1>(y + rows), store_tile<2>(y + 2 * rows), store_tile<3>(y + 3 * rows);
}

template <class Put>
void tiled_bf16_strip(const std::uint8_t* strip, const Panel& x, const Put& put) {
  Floats out[32];
  for (int first = 0, shaped = 0; first < x.rows;) {
    const Panel::Group group = x.group_of(first);
    if (group.size != shaped) set_shapes(bf16_tile_shapes(shaped = group.size));
    const int count = x.rows - first >= 32 ? 32 : group.size;
    (count == 32 ? multiply_bf16<4> : multiply_bf16<1>)(strip, x.group(group), group.size, x.blocks, out);
    put(first, count, out);
    first += count;
  }
  release_tiles();
}

}  // namespace
}  // namespace herd
