// From rows of plain numbers or GGUF blocks to strips of tiles: the codes of 16 rows × 32 columns are taken apart and
// laid out as kernels/tile_formats.h reads them. The block formats are described in
// src/herd/checkpoint/blocks/decode.py.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "herd/quantize.h"
#include "herd/tiles.h"

namespace herd {
namespace {

constexpr const char* kNames[kFormats] = {"f32",    "f16",  "bf16", "q4_0", "q4_1", "q5_0", "q5_1",  "q8_0",
                                          "iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"};

using Byte = std::uint8_t;
typedef Byte Vector __attribute__((vector_size(64)));

// A tile on its way: codes of each row, and the bytes of each row that go behind the codes and into the header.
struct Unpacked {
  alignas(64) Byte codes[kStrip][kTile];
  Byte scales[kStrip][4];
  Byte units[kStrip][4];
};

void nibbles(const Byte* p, Byte* c) {
  for (int j = 0; j < 16; ++j) c[j] = p[j] & 15, c[16 + j] = p[j] >> 4;
}
void fifth_bits(const Byte* p, Byte* c) {
  std::uint32_t high;
  std::memcpy(&high, p, 4);
  for (int j = 0; j < 32; ++j) c[j] |= static_cast<Byte>((high >> j & 1) << 4);
}
// Nibbles of group `sub` of eight, where two groups of 32 share their bytes.
void shared_nibbles(const Byte* p, int sub, Byte* c) {
  const int shift = 4 * (sub % 2);
  for (int j = 0; j < 32; ++j) c[j] = p[32 * (sub / 2) + j] >> shift & 15;
}
// Bits of group `sub` of eight, where four groups of 32 share their bytes.
void shared_pairs(const Byte* p, int sub, int at, Byte* c) {
  const int shift = 2 * (sub % 4);
  for (int j = 0; j < 32; ++j) c[j] |= static_cast<Byte>((p[32 * (sub / 4) + j] >> shift & 3) << at);
}
void shared_bits(const Byte* p, int sub, int at, Byte* c) {
  for (int j = 0; j < 32; ++j) c[j] |= static_cast<Byte>((p[j] >> sub & 1) << at);
}

// Row `r`, tile `t`: `row` is the start of the row's blocks.
void take_apart(Format format, const Byte* row, std::int64_t t, int r, Unpacked& u) {
  Byte* c = u.codes[r];
  const int sub = static_cast<int>(t % 8);
  switch (format) {
    case Format::q4_0:
    case Format::iq4_nl: {
      const Byte* p = row + 18 * t;
      std::memcpy(u.scales[r], p, 2);
      nibbles(p + 2, c);
      break;
    }
    case Format::q4_1: {
      const Byte* p = row + 20 * t;
      std::memcpy(u.scales[r], p, 4);
      nibbles(p + 4, c);
      break;
    }
    case Format::q5_0: {
      const Byte* p = row + 22 * t;
      std::memcpy(u.scales[r], p, 2);
      nibbles(p + 6, c);
      fifth_bits(p + 2, c);
      break;
    }
    case Format::q5_1: {
      const Byte* p = row + 24 * t;
      std::memcpy(u.scales[r], p, 4);
      nibbles(p + 8, c);
      fifth_bits(p + 4, c);
      break;
    }
    case Format::q8_0: {
      const Byte* p = row + 34 * t;
      std::memcpy(u.scales[r], p, 2);
      for (int j = 0; j < 32; ++j) c[j] = p[2 + j] ^ 128;
      break;
    }
    case Format::q2_k: {
      const Byte* p = row + 84 * (t / 8);
      std::memcpy(u.units[r], p + 80, 4);
      std::memcpy(u.scales[r], p + 2 * sub, 2);
      std::memset(c, 0, kTile);
      shared_pairs(p + 16, sub, 0, c);
      break;
    }
    case Format::q3_k: {
      const Byte *p = row + 110 * (t / 8), *packed = p + 96;
      std::memcpy(u.units[r], p + 108, 2);
      for (int i = 0; i < 2; ++i) {
        const int g = 2 * sub + i;
        const int low = packed[g % 8] >> 4 * (g / 8) & 15, high = packed[8 + g % 4] >> 2 * (g / 4) & 3;
        u.scales[r][i] = static_cast<Byte>((low | high << 4) - 32);
      }
      std::memset(c, 0, kTile);
      shared_pairs(p + 32, sub, 0, c);
      shared_bits(p, sub, 2, c);
      break;
    }
    case Format::q4_k:
    case Format::q5_k: {
      const bool five = format == Format::q5_k;
      const Byte *p = row + (five ? 176 : 144) * (t / 8), *packed = p + 4;
      std::memcpy(u.units[r], p, 4);
      if (sub < 4) {
        u.scales[r][0] = packed[sub] & 63, u.scales[r][1] = packed[4 + sub] & 63;
      } else {
        u.scales[r][0] = static_cast<Byte>((packed[4 + sub] & 15) | packed[sub - 4] >> 6 << 4);
        u.scales[r][1] = static_cast<Byte>(packed[4 + sub] >> 4 | packed[sub] >> 6 << 4);
      }
      shared_nibbles(p + (five ? 48 : 16), sub, c);
      if (five) shared_bits(p + 16, sub, 4, c);
      break;
    }
    case Format::q6_k: {
      const Byte* p = row + 210 * (t / 8);
      std::memcpy(u.units[r], p + 208, 2);
      std::memcpy(u.scales[r], p + 192 + 2 * sub, 2);
      const Byte* low = p + 64 * (sub / 4) + 32 * (sub % 2);
      const int shift = 4 * (sub % 4 / 2);
      for (int j = 0; j < 32; ++j) c[j] = low[j] >> shift & 15;
      shared_pairs(p + 128, sub, 4, c);
      break;
    }
    case Format::iq4_xs: {
      const Byte* p = row + 136 * (t / 8);
      std::memcpy(u.units[r], p, 2);
      const int low = p[4 + sub / 2] >> 4 * (sub % 2) & 15, high = p[2 + sub / 4] >> 2 * (sub % 4) & 3;
      u.scales[r][0] = static_cast<Byte>((low | high << 4) - 32);
      nibbles(p + 8 + 16 * sub, c);
      break;
    }
    default:
      break;
  }
}

// Where the rows' scale bytes go: `count` fields of `width` bytes, field by field, 16 rows of each.
void put_fields(const Byte (*fields)[4], int width, int count, Byte* out) {
  for (int f = 0; f < count; ++f)
    for (int r = 0; r < kStrip; ++r)
      std::memcpy(out + (f * kStrip + r) * width, fields[r] + f * width, static_cast<std::size_t>(width));
}

struct Layout {
  int bits;                      // of codes
  int scale_width, scale_count;  // bytes and fields behind the codes
  int unit_count;                // float16 in the header
};
constexpr Layout layout_of(Format format) {
  switch (format) {
    case Format::q4_0:
      return {4, 2, 1, 0};
    case Format::iq4_nl:
      return {4, 2, 1, 0};
    case Format::q4_1:
      return {4, 2, 2, 0};
    case Format::q5_0:
      return {5, 2, 1, 0};
    case Format::q5_1:
      return {5, 2, 2, 0};
    case Format::q8_0:
      return {8, 2, 1, 0};
    case Format::q2_k:
      return {2, 1, 2, 2};
    case Format::q3_k:
      return {3, 1, 2, 1};
    case Format::q4_k:
      return {4, 1, 2, 2};
    case Format::q5_k:
      return {5, 1, 2, 2};
    case Format::q6_k:
      return {6, 1, 2, 1};
    case Format::iq4_xs:
      return {4, 1, 1, 1};
    default:
      return {};
  }
}

// Writes the codes of a tile; returns the end.
Byte* put_codes(const Unpacked& u, int bits, Byte* out) {
  Vector c[8];
  for (int g = 0; g < 8; ++g)
    for (int r = 0; r < kStrip; ++r) std::memcpy(reinterpret_cast<Byte*>(&c[g]) + 4 * r, u.codes[r] + 4 * g, 4);
  const auto put = [&out](Vector v) {
    std::memcpy(out, &v, 64);
    out += 64;
  };
  int at = 0;  // bits written
  if (bits == 8) {
    for (const Vector& v : c) put(v);
    return out;
  }
  if (bits >= 4) {
    for (int j = 0; j < 4; ++j) put((c[j] & 15) | c[j + 4] << 4);
    at = 4;
  }
  if (bits - at >= 2) {
    for (int j = 0; j < 2; ++j) {
      Vector v{};
      for (int g = 0; g < 4; ++g) v |= (c[4 * j + g] >> at & 3) << 2 * g;
      put(v);
    }
    at += 2;
  }
  if (bits - at == 1) {
    Vector v{};
    for (int g = 0; g < 8; ++g) v |= (c[g] >> at & 1) << g;
    put(v);
  }
  return out;
}

void pack_blocks(const Matrix& w, const Byte* source, std::int64_t strip, Byte* out) {
  const std::int64_t row_bytes = stored_row_bytes(w.format, w.columns);
  const int rows = static_cast<int>(std::min<std::int64_t>(kStrip, w.rows - strip * kStrip));
  const Layout layout = layout_of(w.format);
  Unpacked u{};  // rows beyond the last have scale 0
  for (std::int64_t t = 0; t < w.tiles(); ++t) {
    for (int r = 0; r < rows; ++r) take_apart(w.format, source + r * row_bytes, t, r, u);
    if (layout.unit_count && t % 8 == 0) {
      put_fields(u.units, 2, layout.unit_count, out);
      out += 32 * layout.unit_count;
    }
    out = put_codes(u, layout.bits, out);
    put_fields(u.scales, layout.scale_width, layout.scale_count, out);
    out += kStrip * layout.scale_width * layout.scale_count;
  }
}

// Numbers of `Size` bytes; `Run` columns of a row stay neighbours.
template <int Size, int Run>
void pack_plain(const Matrix& w, const Byte* source, std::int64_t strip, Byte* out) {
  const int rows = static_cast<int>(std::min<std::int64_t>(kStrip, w.rows - strip * kStrip));
  for (std::int64_t t = 0; t < w.tiles(); ++t, out += kStrip * kTile * Size) {
    const int columns = static_cast<int>(std::min<std::int64_t>(kTile, w.columns - t * kTile));
    if (rows < kStrip || columns < kTile) std::memset(out, 0, kStrip * kTile * Size);
    for (int r = 0; r < rows; ++r) {
      const Byte* row = source + (r * w.columns + t * kTile) * Size;
      Byte* to = out + r * Run * Size;
      int k = 0;
      for (; k + Run <= columns; k += Run) std::memcpy(to + k * kStrip * Size, row + k * Size, Run * Size);
      for (int i = 0; k + i < columns; ++i) std::memcpy(to + (k * kStrip + i) * Size, row + (k + i) * Size, Size);
    }
  }
}

}  // namespace

Format format_named(const std::string& name) {
  const auto found = std::find(std::begin(kNames), std::end(kNames), name);
  if (found == std::end(kNames)) throw std::invalid_argument("no weight format: " + name);
  return static_cast<Format>(found - std::begin(kNames));
}

const char* format_name(Format format) { return kNames[static_cast<int>(format)]; }

std::int64_t stored_row_bytes(Format format, std::int64_t columns) {
  if (format <= Format::bf16) return columns * (format == Format::f32 ? 4 : 2);
  const BlockSize block = block_size(block_format(format_name(format)));
  return (columns + block.weights - 1) / block.weights * block.bytes;
}

void pack_strip(const Matrix& shape, std::int64_t strip, const Byte* source, Byte* out) {
  switch (shape.format) {
    case Format::f32:
      return pack_plain<4, 1>(shape, source, strip, out);
    case Format::f16:
      return pack_plain<2, 1>(shape, source, strip, out);
    case Format::bf16:
      return pack_plain<2, 2>(shape, source, strip, out);
    default:
      return pack_blocks(shape, source, strip, out);
  }
}

}  // namespace herd
