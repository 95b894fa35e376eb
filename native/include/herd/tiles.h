// Weight matrices as the engine holds them, and the inputs they are multiplied with.
//
// A matrix [rows, columns] is cut into strips of 16 rows, each one sequential stream of tiles of 16 rows × 32 columns;
// rows and columns are padded with zeros to whole tiles. kernels/tile_formats.h says what a tile of each format holds.
#pragma once

#include <cstdint>
#include <string>

namespace herd {

constexpr int kStrip = 16;  // rows of a strip: lanes of a vector
constexpr int kTile = 32;   // columns of a tile: inputs that share a scale

enum class Format : std::uint8_t {
  f32,
  f16,
  bf16,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q8_0,
  iq4_nl,
  q2_k,
  q3_k,
  q4_k,
  q5_k,
  q6_k,
  iq4_xs
};
constexpr int kFormats = 15;

// Bytes of a tile, and of the header in front of every eight tiles of a super-block format (else 0).
struct TileSize {
  int tile, header;
};
Format format_named(const std::string& name);  // throws std::invalid_argument
const char* format_name(Format format);
constexpr TileSize tile_size(Format format) {
  constexpr TileSize sizes[kFormats] = {{2048, 0}, {1024, 0}, {1024, 0}, {288, 0},  {320, 0},
                                        {352, 0},  {384, 0},  {544, 0},  {288, 0},  {160, 64},
                                        {224, 32}, {288, 64}, {352, 64}, {416, 32}, {272, 32}};
  return sizes[static_cast<int>(format)];
}

struct Matrix {
  Format format = Format::f32;
  std::int64_t rows = 0, columns = 0;
  const std::uint8_t* data = nullptr;

  std::int64_t strips() const { return (rows + kStrip - 1) / kStrip; }
  std::int64_t tiles() const { return (columns + kTile - 1) / kTile; }  // of a strip
  std::int64_t strip_bytes() const {
    const TileSize size = tile_size(format);
    return tiles() * size.tile + (tiles() + 7) / 8 * size.header;
  }
  std::int64_t bytes() const { return strips() * strip_bytes(); }
  const std::uint8_t* strip(std::int64_t index) const { return data + index * strip_bytes(); }
};

// Bytes of a row of `columns` numbers in a file.
std::int64_t stored_row_bytes(Format format, std::int64_t columns);

// Lays out one strip of a matrix whose rows lie one after the other in a file's format (plain numbers or GGUF's
// blocks). `source` is where the strip's first row begins; `out` has strip_bytes() bytes.
void pack_strip(const Matrix& shape, std::int64_t strip, const std::uint8_t* source, std::uint8_t* out);

// How a format's products take their inputs: as int8 in blocks of 32 with a scale each, or as floating point.
enum class Inputs : std::uint8_t { int8, f32, bf16 };
constexpr int kInputKinds = 3;

// 32 inputs of one row as int8: value ≈ scale·codes. The sums save work in formats with zero points and offsets: of the
// codes with opposite sign (all 32, the first and the second 16), and scaled.
struct alignas(64) Int8Block {
  std::int8_t codes[32];
  float scale;
  std::int32_t minus[3];
  float sum[3];
  float unused;
};

constexpr std::int64_t block_bytes(Inputs kind) {
  return kind == Inputs::int8 ? sizeof(Int8Block) : kind == Inputs::f32 ? 4 * kTile : 2 * kTile;
}

// Rows of inputs, in groups that a kernel takes at once: eight rows, and what remains in four, two and one. In a group
// the blocks of its rows alternate: [block][row].
struct Panel {
  Inputs kind;
  int rows;
  std::int64_t blocks;  // of a row
  std::uint8_t* data;

  struct Group {
    int first, size;
  };
  Group group_of(int row) const {
    int first = row / 8 * 8;
    const int left = rows - first;
    if (left >= 8) return {first, 8};
    for (int size = 4;; size /= 2) {
      if (!(left & size)) continue;
      if (row < first + size) return {first, size};
      first += size;
    }
  }
  std::uint8_t* group(Group g) const { return data + g.first * blocks * block_bytes(kind); }
  std::uint8_t* block(int row, std::int64_t b) const {
    const Group g = group_of(row);
    return group(g) + (b * g.size + row - g.first) * block_bytes(kind);
  }
};

}  // namespace herd
