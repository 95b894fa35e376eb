// y = x·Wᵀ, one strip of 16 outputs at a time.
//
// Quantised weights: inputs are int8 in blocks of 32, a block's products are added exactly in 32 bits, then scaled and
// added in the order of the blocks. Plain weights: products in floating point, even and odd columns (or pairs) apart.
// So the bits of a row's outputs depend on the row and the weights, and never on how many rows are computed together.
#pragma once

#include "herd/engine_kernels.h"
#include "slab_kernels.h"
#if defined(HERD_AMX)
#include "amx_kernels.h"
#endif

namespace herd {
namespace {

#if defined(__AVX512BF16__)
constexpr Inputs kBf16Inputs = Inputs::bf16;
#else
constexpr Inputs kBf16Inputs = Inputs::f32;
#endif

constexpr Inputs inputs_of(Format format) {
  return format > Format::bf16 ? Inputs::int8 : format == Format::bf16 ? kBf16Inputs : Inputs::f32;
}

// Rows whose sums fit into the registers; the rows of a group are taken so many at a time.
#if defined(__AVX512F__)
constexpr int kIntegerRows = 8, kPlainRows = 8;
#else
constexpr int kIntegerRows = 4, kPlainRows = 2;
#endif
constexpr int kSharing = 16;  // from so many rows on it pays to unpack codes once for all of them

// acc[r] += Σ codes[r][i]·x[i], i < 4, for 16 rows r. Codes have at most kBits bits.
template <int kBits>
inline Ints add_products(Ints acc, Codes codes, const std::int8_t* x) {
  std::int32_t four;
  std::memcpy(&four, x, 4);
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, _mm512_set1_epi32(four));
#elif defined(__AVX512BW__)
  // Sums of two products fit in 16 bits up to seven bits of code; the eighth is multiplied by itself.
  const __m512i inputs = _mm512_set1_epi32(four), ones = _mm512_set1_epi16(1);
  const __m512i low = kBits < 8 ? (__m512i)codes : (__m512i)(codes & 127);
  __m512i sums = _mm512_madd_epi16(_mm512_maddubs_epi16(low, inputs), ones);
  if constexpr (kBits == 8) {
    const __m512i high = _mm512_maddubs_epi16((__m512i)(codes >> 7), inputs);
    sums = _mm512_add_epi32(sums, _mm512_slli_epi32(_mm512_madd_epi16(high, ones), 7));
  }
  return acc + (Ints)sums;
#elif defined(__AVX2__)
  const __m256i inputs = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
  for (int h = 0; h < 2; ++h) {
    const auto half = (__m256i)codes.h[h];
    const __m256i low = kBits < 8 ? half : _mm256_and_si256(half, _mm256_set1_epi8(127));
    acc.h[h] += (Ints::Half)_mm256_madd_epi16(_mm256_maddubs_epi16(low, inputs), ones);
    if constexpr (kBits == 8) {
      const __m256i bit = _mm256_and_si256(_mm256_srli_epi16(half, 7), _mm256_set1_epi8(1));
      const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(bit, inputs), ones);
      acc.h[h] += (Ints::Half)_mm256_slli_epi32(high, 7);
    }
  }
  return acc;
#else
  for (int r = 0; r < 16; ++r) {
    std::int32_t total = acc[r];
    for (int i = 0; i < 4; ++i) total += codes[4 * r + i] * x[i];
    acc.set(r, total);
  }
  return acc;
#endif
}

// acc[m] += what one block of quantised weights gives with the inputs of Rows neighbouring rows.
template <class F, int Rows>
inline void add_block(const Codes* c, const Floats* scale, const Floats* offset, const Int8Block* x, Floats* acc) {
  constexpr int kChunk = F::kGroups == 1 ? 8 : 4;  // vectors of codes that share a scale
  constexpr int kPair = Rows % 2 ? 1 : 2;          // rows whose chains of products run side by side
#pragma GCC unroll 8
  for (int m = 0; m < Rows; m += kPair) {
#pragma GCC unroll 2
    for (int part = 0; part < F::kGroups; ++part) {
      Ints s[kPair];
      const int sum = F::kGroups == 1 ? 0 : part + 1;
      for (int p = 0; p < kPair; ++p) s[p] = (Ints{} + x[m + p].minus[sum]) * F::kZero;
#pragma GCC unroll 8
      for (int g = 0; g < kChunk; ++g)
        for (int p = 0; p < kPair; ++p) {
          const int at = kChunk * part + g;
          s[p] = add_products<F::kBits>(s[p], c[at], x[m + p].codes + 4 * at);
        }
      for (int p = 0; p < kPair; ++p) {
        acc[m + p] += convert(s[p]) * (scale[part] * x[m + p].scale);
        if (F::kOffset) acc[m + p] -= offset[part] * x[m + p].sum[sum];
      }
    }
  }
}

// Outputs of Rows rows, in a group of `group` rows, with one strip of quantised weights.
template <class F, int Rows>
inline void quantised_strip(const std::uint8_t* w, const Int8Block* x, int group, std::int64_t blocks, Floats* y) {
  constexpr int kHeader = tile_size(F::kFormat).header, kBytes = tile_size(F::kFormat).tile;
  Floats acc[Rows] = {};
  Floats units[2] = {};
  for (std::int64_t b = 0; b < blocks; ++b, x += group) {
    if (kHeader && b % 8 == 0) {
      for (int i = 0; i < kHeader / 32; ++i) units[i] = from_halves(w + 32 * i);
      w += kHeader;
    }
    fetch_ahead(w, kBytes);
    Codes c[8];
    Floats scale[2], offset[2];
    F::read(w, units, c, scale, offset);
    w += kBytes;
    add_block<F, Rows>(c, scale, offset, x, acc);
  }
  for (int m = 0; m < Rows; ++m) y[m] = acc[m];
}

// The same for a panel's groups of eight rows, where they are many and the bits of a code lie apart, as 3, 5 and 6 bits
// do; other codes are unpacked as fast as they are read. Returns how many rows were done.
template <class F, class Put>
inline int shared_strip(const std::uint8_t* strip, const Panel& x, const Put& put) {
  constexpr bool kApart = (F::kBits & (F::kBits - 1)) != 0;
  if (!kApart || x.rows < kSharing) return 0;
  return in_slabs<F, 0>(strip, x, put,
                        [&x](const Unpacked<F>& w, int blocks, const Int8Block* in, int count, Floats* sums) {
                          for (int m = 0; m < count; m += kIntegerRows) {
                            const Int8Block* group = in + m / 8 * 8 * x.blocks + m % 8;
                            Floats acc[kIntegerRows];
                            std::copy_n(sums + m, kIntegerRows, acc);
                            for (int b = 0; b < blocks; ++b)
                              add_block<F, kIntegerRows>(w.codes[b], w.scale[b], w.offset[b], group + 8 * b, acc);
                            std::copy_n(acc, kIntegerRows, sums + m);
                          }
                        });
}

// The same with plain weights and inputs of 32 bits.
template <class F, int Rows>
inline void plain_strip(const std::uint8_t* w, const float* x, int group, std::int64_t blocks, Floats* y) {
  constexpr int kBytes = tile_size(F::kFormat).tile;
  Floats even_sum[Rows] = {}, odd_sum[Rows] = {};
  for (std::int64_t b = 0; b < blocks; ++b, x += group * kTile, w += kBytes) {
    fetch_ahead(w, kBytes);
    for (int pair = 0; pair < kTile / 2; ++pair) {
      Floats even, odd;
      F::read(w, pair, &even, &odd);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        even_sum[m] += even * x[kTile * m + 2 * pair];
        odd_sum[m] += odd * x[kTile * m + 2 * pair + 1];
      }
    }
  }
  for (int m = 0; m < Rows; ++m) y[m] = even_sum[m] + odd_sum[m];
}

#if defined(__AVX512BF16__)
// The same with bfloat16 on both sides, a pair of columns at a time. Two chains of sums for each row, as a product
// waits six cycles for the one before it.
template <int Rows>
inline void paired_strip(const std::uint8_t* w, const std::uint32_t* x, int group, std::int64_t blocks, Floats* y) {
  constexpr int kPairs = kTile / 2, kBytes = tile_size(Format::bf16).tile;
  Floats even_sum[Rows] = {}, odd_sum[Rows] = {};
  for (std::int64_t b = 0; b < blocks; ++b, x += group * kPairs, w += kBytes) {
    fetch_ahead(w, kBytes);
    for (int pair = 0; pair < kPairs; pair += 2) {
      const Words even = load<Words>(w + 64 * pair), odd = load<Words>(w + 64 * pair + 64);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        even_sum[m] = add_pairs(even_sum[m], x[kPairs * m + pair], even);
        odd_sum[m] = add_pairs(odd_sum[m], x[kPairs * m + pair + 1], odd);
      }
    }
  }
  for (int m = 0; m < Rows; ++m) y[m] = even_sum[m] + odd_sum[m];
}
#endif

template <class F, int Group>
inline void strip_of_group(const std::uint8_t* w, const std::uint8_t* x, std::int64_t blocks, Floats* y) {
  if constexpr (inputs_of(F::kFormat) == Inputs::int8) {
    constexpr int kRows = std::min(Group, kIntegerRows);
    for (int m = 0; m < Group; m += kRows)
      quantised_strip<F, kRows>(w, reinterpret_cast<const Int8Block*>(x) + m, Group, blocks, y + m);
#if defined(__AVX512BF16__)
  } else if constexpr (inputs_of(F::kFormat) == Inputs::bf16) {
    paired_strip<Group>(w, reinterpret_cast<const std::uint32_t*>(x), Group, blocks, y);
#endif
  } else {
    constexpr int kRows = std::min(Group, kPlainRows);
    for (int m = 0; m < Group; m += kRows)
      plain_strip<F, kRows>(w, reinterpret_cast<const float*>(x) + kTile * m, Group, blocks, y + m);
  }
}

// y[m][0 … width) (+)= the outputs of strip `index` for all rows m of x.
template <class F>
void strip_of_panel(const Matrix& w, std::int64_t index, const Panel& x, float* y, std::int64_t stride, bool add) {
  const std::uint8_t* strip = w.strip(index);
  const int width = static_cast<int>(std::min<std::int64_t>(kStrip, w.rows - kStrip * index));
  const auto put_rows = [&](int first, int count, const Floats* out) {
    for (int m = 0; m < count; ++m) {
      float* row = y + (first + m) * stride;
      store_some(row, add ? load_some(row, width) + out[m] : out[m], width);
    }
  };
  int first = 0;
#if defined(HERD_AMX)
  if constexpr (inputs_of(F::kFormat) == Inputs::bf16) return tiled_bf16_strip(strip, x, put_rows);
  if constexpr (inputs_of(F::kFormat) == Inputs::int8) first = tiled_strip<F>(strip, x, put_rows);
#else
  if constexpr (inputs_of(F::kFormat) == Inputs::int8) first = shared_strip<F>(strip, x, put_rows);
#endif
  while (first < x.rows) {
    const Panel::Group group = x.group_of(first);
    Floats out[8];
    switch (group.size) {
      case 8:
        strip_of_group<F, 8>(strip, x.group(group), x.blocks, out);
        break;
      case 4:
        strip_of_group<F, 4>(strip, x.group(group), x.blocks, out);
        break;
      case 2:
        strip_of_group<F, 2>(strip, x.group(group), x.blocks, out);
        break;
      default:
        strip_of_group<F, 1>(strip, x.group(group), x.blocks, out);
    }
    put_rows(first, group.size, out);
    first += group.size;
  }
}

void multiply(const Matrix& w, std::int64_t strip, const Panel& x, float* y, std::int64_t stride, bool add) {
  with_format(w.format, [&](auto format) { strip_of_panel<decltype(format)>(w, strip, x, y, stride, add); });
}

float largest_of(const float* values, std::int64_t n) {
  Floats found{};
  in_vectors(n, [&](std::int64_t i, int lanes) { found = larger(magnitude(load_some(values + i, lanes)), found); });
  return maximum(found);
}

// Inputs 32·b … of one row into a panel.
void put_block(const Panel& panel, int row, std::int64_t b, const float* values, float largest) {
  std::uint8_t* to = panel.block(row, b);
  if (panel.kind == Inputs::f32) {
    std::memcpy(to, values, 4 * kTile);
#if defined(__AVX512BF16__)
  } else if (panel.kind == Inputs::bf16) {
    store(to, (Words)_mm512_cvtne2ps_pbh((__m512)load(values + 16), (__m512)load(values)));
#endif
  } else {
    auto& block = *reinterpret_cast<Int8Block*>(to);
    // Added to the scale: nothing, or not a number where an input is none, so that the outputs are none either.
    const float poison = sum(load(values) * 0.0f + load(values + 16) * 0.0f);
    const Floats low = finite(load(values)), high = finite(load(values + 16));
    if (largest == 0) largest = maximum(larger(magnitude(low), magnitude(high)));
    block.scale = largest * (1.0f / 127.0f) + poison;
    // The quotient of nothing, and of next to nothing, is infinite: such inputs count as 0.
    const float quotient = 127.0f / largest, inverse = quotient < kInfinity ? quotient : 0.0f;
    // 1.5·2^23 rounds to whole numbers and leaves them in the low bits.
    const Ints a = bits<Ints>(low * inverse + 12582912.0f) - 0x4b400000;
    const Ints c = bits<Ints>(high * inverse + 12582912.0f) - 0x4b400000;
    to_bytes(block.codes, a), to_bytes(block.codes + 16, c);
    const std::int32_t first = sum(a), second = sum(c);
    block.minus[0] = -first - second, block.minus[1] = -first, block.minus[2] = -second;
    for (int i = 0; i < 3; ++i) block.sum[i] = -block.scale * static_cast<float>(block.minus[i]);
  }
}

// The stored values of row `index` of a matrix.
void read_row(const Matrix& w, std::int64_t index, float* out) {
  const std::uint8_t* strip = w.strip(index / kStrip);
  const int lane = static_cast<int>(index % kStrip);
  with_format(w.format, [&](auto format) {
    using F = decltype(format);
    constexpr TileSize size = tile_size(F::kFormat);
    const std::uint8_t* p = strip;
    Floats units[2] = {};
    for (std::int64_t b = 0; b < w.tiles(); ++b, p += size.tile) {
      if (size.header && b % 8 == 0) {
        for (int i = 0; i < size.header / 32; ++i) units[i] = from_halves(p + 32 * i);
        p += size.header;
      }
      float values[kTile];
      if constexpr (F::kFormat <= Format::bf16) {
        for (int pair = 0; pair < kTile / 2; ++pair) {
          Floats even, odd;
          F::read(p, pair, &even, &odd);
          values[2 * pair] = even[lane], values[2 * pair + 1] = odd[lane];
        }
      } else {
        Codes c[8];
        Floats scale[2], offset[2] = {};
        F::read(p, units, c, scale, offset);
        for (int i = 0; i < kTile; ++i) {
          const int group = F::kGroups == 1 ? 0 : i / 16;
          const float code = static_cast<float>(c[i / 4][4 * lane + i % 4] - F::kZero);
          values[i] = scale[group][lane] * code - (F::kOffset ? offset[group][lane] : 0.0f);
        }
      }
      const auto count = std::min<std::int64_t>(kTile, w.columns - kTile * b);
      std::memcpy(out + kTile * b, values, sizeof(float) * static_cast<std::size_t>(count));
    }
  });
}

}  // namespace
}  // namespace herd
