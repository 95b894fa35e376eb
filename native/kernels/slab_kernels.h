// Many rows with quantised weights: codes are taken out of their bits a few blocks at a time, for a slab of rows that
// then share them. They and the rows' sums stay in the nearest cache; inputs only pass through, each is read once.
#pragma once

#include "tile_formats.h"

namespace herd {
namespace {

constexpr int kUnpacked = 8;  // blocks whose codes are unpacked at a time: those of a super-block
constexpr int kSlab = 256;    // rows that share them

template <class F>
struct Unpacked {
  Codes codes[kUnpacked][8];
  Floats scale[kUnpacked][F::kGroups], offset[kUnpacked][F::kGroups];  // no offset is written in formats without
};

// `kOff` is taken off each code. Returns the end of what was read.
template <class F, int kOff>
inline const std::uint8_t* unpack(const std::uint8_t* w, int count, Unpacked<F>& out) {
  constexpr int kHeader = tile_size(F::kFormat).header, kBytes = tile_size(F::kFormat).tile;
  Floats units[2] = {};
  for (int i = 0; i < kHeader / 32; ++i) units[i] = from_halves(w + 32 * i);
  w += kHeader;
  for (int b = 0; b < count; ++b, w += kBytes) {
    fetch_ahead(w, kBytes);
    Codes c[8];
    F::read(w, units, c, out.scale[b], out.offset[b]);
    for (int g = 0; g < 8; ++g) out.codes[b][g] = kOff ? c[g] - static_cast<std::uint8_t>(kOff) : c[g];
  }
  return w;
}

// Calls put(first, count, outputs) for the rows of a panel's groups of eight; returns how many these are. What a slab's
// sums become with a few blocks is add(weights, blocks, inputs, count, sums), the inputs of each group lying 8·x.blocks
// after those of the one before.
template <class F, int kOff, class Put, class Add>
inline int in_slabs(const std::uint8_t* strip, const Panel& x, const Put& put, const Add& add) {
  const int rows = x.rows / 8 * 8;
  for (int first = 0; first < rows; first += kSlab) {
    const int count = std::min(kSlab, rows - first);
    Floats sums[kSlab];
    std::fill(sums, sums + count, Floats{});
    const std::uint8_t* w = strip;
    for (std::int64_t b = 0; b < x.blocks; b += kUnpacked) {
      const int blocks = static_cast<int>(std::min<std::int64_t>(kUnpacked, x.blocks - b));
      Unpacked<F> unpacked;
      w = unpack<F, kOff>(w, blocks, unpacked);
      add(unpacked, blocks, reinterpret_cast<const Int8Block*>(x.data) + first * x.blocks + 8 * b, count, sums);
    }
    put(first, count, sums);
  }
  return rows;
}

}  // namespace
}  // namespace herd
