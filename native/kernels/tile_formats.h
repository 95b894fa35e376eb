// What a tile of 16 rows × 32 columns holds in each format, in the order in which it is multiplied.
//
// Codes come as eight vectors of [16 rows][4 columns] bytes, which is what a byte product takes. Formats of fewer bits
// keep them packed, so that unpacking is a shift and a mask for all rows at once: vector j of four-bit codes has
// columns 4j … in its low and 16 + 4j … in its high halves; fifth and higher bits have vectors of their own. Then come
// the scales of the 16 rows. Super-blocks have a header with the rows' float16 units before every eight tiles, read as
// `units`. A weight is scale·(code - kZero) - offset.
#pragma once

#include "herd/tiles.h"
#include "vectors.h"

namespace herd {
namespace {

constexpr std::int64_t kAhead = 4096;  // bytes between what is multiplied and what is fetched from memory

inline void fetch_ahead(const std::uint8_t* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + kAhead + i, 0, 3);
}

inline void four_bits(const std::uint8_t* p, Codes* c) {
  for (int j = 0; j < 4; ++j) {
    const Codes both = load<Codes>(p + 64 * j);
    c[j] = both & 15, c[j + 4] = both >> 4;
  }
}

// A vector with one bit of all eight; two vectors with two bits of four each. They are added above `at` bits.
inline void add_one_bit(const std::uint8_t* p, int at, Codes* c) {
  const Codes v = load<Codes>(p);
  for (int g = 0; g < 8; ++g) c[g] |= (v >> g & 1) << at;
}
inline void two_bits(const std::uint8_t* p, Codes* c) {
  for (int g = 0; g < 8; ++g) c[g] = load<Codes>(p + 64 * (g / 4)) >> 2 * (g % 4) & 3;
}
inline void add_two_bits(const std::uint8_t* p, int at, Codes* c) {
  Codes high[8];
  two_bits(p, high);
  for (int g = 0; g < 8; ++g) c[g] |= high[g] << at;
}

// Four-bit codes of the code book of iq4_nl and iq4_xs, as its values + 128.
inline void look_up(const std::uint8_t* p, Codes* c) {
  alignas(16) static constexpr std::uint8_t kBook[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                         129, 141, 153, 166, 181, 197, 217, 241};
  four_bits(p, c);
#if defined(__AVX512BW__)
  const __m512i book = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kBook)));
  for (int g = 0; g < 8; ++g) c[g] = (Codes)_mm512_shuffle_epi8(book, (__m512i)c[g]);
#elif defined(__AVX2__)
  const __m256i book = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kBook)));
  for (int g = 0; g < 8; ++g)
    for (auto& half : c[g].h) half = (Codes::Half)_mm256_shuffle_epi8(book, (__m256i)half);
#else
  for (int g = 0; g < 8; ++g)
    for (int i = 0; i < 64; ++i) c[g].set(i, kBook[c[g][i]]);
#endif
}

// kGroups: columns with a scale of their own, 1: all 32, 2: 16 and 16. kOffset: whether there are offsets, as many as
// scales. kBits: of the largest code.
struct Quantised {
  static constexpr int kGroups = 1, kZero = 0, kBits = 4;
  static constexpr bool kOffset = false;
};
struct Q4_0 : Quantised {
  static constexpr Format kFormat = Format::q4_0;
  static constexpr int kZero = 8;
  static void read(const std::uint8_t* p, const Floats*, Codes* c, Floats* scale, Floats*) {
    four_bits(p, c);
    scale[0] = from_halves(p + 256);
  }
};
struct Q4_1 : Quantised {
  static constexpr Format kFormat = Format::q4_1;
  static constexpr bool kOffset = true;
  static void read(const std::uint8_t* p, const Floats*, Codes* c, Floats* scale, Floats* offset) {
    four_bits(p, c);
    scale[0] = from_halves(p + 256), offset[0] = -from_halves(p + 288);
  }
};
struct Q5_0 : Quantised {
  static constexpr Format kFormat = Format::q5_0;
  static constexpr int kZero = 16, kBits = 5;
  static void read(const std::uint8_t* p, const Floats*, Codes* c, Floats* scale, Floats*) {
    four_bits(p, c);
    add_one_bit(p + 256, 4, c);
    scale[0] = from_halves(p + 320);
  }
};
struct Q5_1 : Quantised {
  static constexpr Format kFormat = Format::q5_1;
  static constexpr int kBits = 5;
  static constexpr bool kOffset = true;
  static void read(const std::uint8_t* p, const Floats*, Codes* c, Floats* scale, Floats* offset) {
    four_bits(p, c);
    add_one_bit(p + 256, 4, c);
    scale[0] = from_halves(p + 320), offset[0] = -from_halves(p + 352);
  }
};
struct Q8_0 : Quantised {
  static constexpr Format kFormat = Format::q8_0;
  static constexpr int kZero = 128, kBits = 8;
  static void read(const std::uint8_t* p, const Floats*, Codes* c, Floats* scale, Floats*) {
    for (int g = 0; g < 8; ++g) c[g] = load<Codes>(p + 64 * g);
    scale[0] = from_halves(p + 512);
  }
};
struct Iq4_nl : Quantised {
  static constexpr Format kFormat = Format::iq4_nl;
  static constexpr int kZero = 128, kBits = 8;
  static void read(const std::uint8_t* p, const Floats*, Codes* c, Floats* scale, Floats*) {
    look_up(p, c);
    scale[0] = from_halves(p + 256);
  }
};
struct Q2_K : Quantised {
  static constexpr Format kFormat = Format::q2_k;
  static constexpr int kGroups = 2, kBits = 2;
  static constexpr bool kOffset = true;
  static void read(const std::uint8_t* p, const Floats* units, Codes* c, Floats* scale, Floats* offset) {
    two_bits(p, c);
    for (int half = 0; half < 2; ++half) {
      std::uint8_t low[16], high[16];  // scale and offset in a byte
      for (int r = 0; r < 16; ++r) low[r] = p[128 + 16 * half + r] & 15, high[r] = p[128 + 16 * half + r] >> 4;
      scale[half] = units[0] * from_bytes(low), offset[half] = units[1] * from_bytes(high);
    }
  }
};
struct Q3_K : Quantised {
  static constexpr Format kFormat = Format::q3_k;
  static constexpr int kGroups = 2, kZero = 4, kBits = 3;
  static void read(const std::uint8_t* p, const Floats* units, Codes* c, Floats* scale, Floats*) {
    two_bits(p, c);
    add_one_bit(p + 128, 2, c);
    scale[0] = units[0] * from_signed(p + 192), scale[1] = units[0] * from_signed(p + 208);
  }
};
struct Q4_K : Quantised {
  static constexpr Format kFormat = Format::q4_k;
  static constexpr bool kOffset = true;
  static void read(const std::uint8_t* p, const Floats* units, Codes* c, Floats* scale, Floats* offset) {
    four_bits(p, c);
    scale[0] = units[0] * from_bytes(p + 256);
    offset[0] = units[1] * from_bytes(p + 272);
  }
};
struct Q5_K : Quantised {
  static constexpr Format kFormat = Format::q5_k;
  static constexpr int kBits = 5;
  static constexpr bool kOffset = true;
  static void read(const std::uint8_t* p, const Floats* units, Codes* c, Floats* scale, Floats* offset) {
    four_bits(p, c);
    add_one_bit(p + 256, 4, c);
    scale[0] = units[0] * from_bytes(p + 320);
    offset[0] = units[1] * from_bytes(p + 336);
  }
};
struct Q6_K : Quantised {
  static constexpr Format kFormat = Format::q6_k;
  static constexpr int kGroups = 2, kZero = 32, kBits = 6;
  static void read(const std::uint8_t* p, const Floats* units, Codes* c, Floats* scale, Floats*) {
    four_bits(p, c);
    add_two_bits(p + 256, 4, c);
    scale[0] = units[0] * from_signed(p + 384), scale[1] = units[0] * from_signed(p + 400);
  }
};
struct Iq4_xs : Quantised {
  static constexpr Format kFormat = Format::iq4_xs;
  static constexpr int kZero = 128, kBits = 8;
  static void read(const std::uint8_t* p, const Floats* units, Codes* c, Floats* scale, Floats*) {
    look_up(p, c);
    scale[0] = units[0] * from_signed(p + 256);
  }
};

// Plain numbers: columns one after the other, 16 rows of each. bfloat16 has pairs of columns, [16 rows][2].
struct F32 {
  static constexpr Format kFormat = Format::f32;
  static void read(const std::uint8_t* p, int pair, Floats* even, Floats* odd) {
    *even = load(p + 128 * pair), *odd = load(p + 128 * pair + 64);
  }
};
struct F16 {
  static constexpr Format kFormat = Format::f16;
  static void read(const std::uint8_t* p, int pair, Floats* even, Floats* odd) {
    *even = from_halves(p + 64 * pair), *odd = from_halves(p + 64 * pair + 32);
  }
};
struct Bf16 {
  static constexpr Format kFormat = Format::bf16;
  static void read(const std::uint8_t* p, int pair, Floats* even, Floats* odd) {
    const Words pairs = load<Words>(p + 64 * pair);
    *even = even_bf16(pairs), *odd = odd_bf16(pairs);
  }
};

// Calls f with a value of the format's type.
template <class Function>
inline void with_format(Format format, const Function& f) {
  switch (format) {
    case Format::f32:
      return f(F32{});
    case Format::f16:
      return f(F16{});
    case Format::bf16:
      return f(Bf16{});
    case Format::q4_0:
      return f(Q4_0{});
    case Format::q4_1:
      return f(Q4_1{});
    case Format::q5_0:
      return f(Q5_0{});
    case Format::q5_1:
      return f(Q5_1{});
    case Format::q8_0:
      return f(Q8_0{});
    case Format::iq4_nl:
      return f(Iq4_nl{});
    case Format::q2_k:
      return f(Q2_K{});
    case Format::q3_k:
      return f(Q3_K{});
    case Format::q4_k:
      return f(Q4_K{});
    case Format::q5_k:
      return f(Q5_K{});
    case Format::q6_k:
      return f(Q6_K{});
    case Format::iq4_xs:
      return f(Iq4_xs{});
  }
}

}  // namespace
}  // namespace herd
