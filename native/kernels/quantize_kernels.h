// The encoders of all block formats, compiled once per instruction set: the including file names the kernel set in
// HERD_KERNELS. A super-block has whole-number scales for its groups and one float16 for all of them; those are found
// in turns, the codes and group scales for the float16s and the float16s for the codes, each by least squares.
#include "herd/quantize.h"
#include "quantize_fit.h"

namespace herd {
namespace {

constexpr int kSuper = 256;
constexpr int kRounds = 3;

struct Writer {
  std::uint8_t* out;
  bool fits = true;

  // Stores a scale; what does not fit in float16 is the caller's error.
  void half(int at, float value) {
    const std::uint16_t bits = float_to_half(value);
    fits = fits && (bits & 0x7c00u) != 0x7c00u;
    out[at] = static_cast<std::uint8_t>(bits), out[at + 1] = static_cast<std::uint8_t>(bits >> 8);
  }

  // Weight j in the low half of a byte, weight j + count in the high half.
  void halves(int at, const std::uint8_t* codes, int count) {
    for (int j = 0; j < count; ++j) out[at + j] = static_cast<std::uint8_t>((codes[j] & 15) | codes[j + count] << 4);
  }

  // The fifth bits of 32 codes.
  void fifth_bits(int at, const std::uint8_t* codes) {
    for (int j = 0; j < 32; ++j)
      out[at + j / 8] = static_cast<std::uint8_t>(out[at + j / 8] | (codes[j] >> 4 & 1) << j % 8);
  }

  // The low two bits of 256 codes: each half of the block as four rows of 32, one above the other.
  void two_bits(int at, const std::uint8_t* codes) {
    for (int half = 0; half < 2; ++half)
      for (int j = 0; j < 32; ++j) {
        const std::uint8_t* c = codes + 128 * half + j;
        out[at + 32 * half + j] =
            static_cast<std::uint8_t>((c[0] & 3) | (c[32] & 3) << 2 | (c[64] & 3) << 4 | (c[96] & 3) << 6);
      }
  }
};

// --- blocks of 32 ---------------------------------------------------------------------------------------------------

template <class Codes>
inline float one_scale(const float* x, const float* w, std::uint8_t* codes) {
  float q[32];
  const float scale = as_half(fit_scale<Codes, 32>(x, w));
  encode<Codes, 32>(x, w, std::isfinite(scale) ? scale : 0, q);
  for (int j = 0; j < 32; ++j) codes[j] = static_cast<std::uint8_t>(Codes::index(q[j]));
  return scale;
}

inline Line one_line(const float* x, const float* w, float top, std::uint8_t* codes) {
  float q[32];
  Line line = fit_line<true, 32>(x, w, top);
  line = {as_half(line.scale), as_half(line.offset)};
  encode<32>(x, w, std::isfinite(line.scale) && std::isfinite(line.offset) ? line : Line{}, top, q);
  for (int j = 0; j < 32; ++j) codes[j] = static_cast<std::uint8_t>(q[j]);
  return line;
}

// Largest weight / 127, and half away from zero: with 255 levels a search brings nothing.
inline void write_q8_0(const float* x, Writer& to) {
  float largest = 0;
  for (int j = 0; j < 32; ++j) largest = std::max(largest, std::fabs(x[j]));
  const float scale = largest / 127.0f, inverse = inverse_of(scale);
  to.half(0, scale);
  for (int j = 0; j < 32; ++j) {
    const float t = x[j] * inverse, whole = std::trunc(t);
    to.out[2 + j] = static_cast<std::uint8_t>(
        static_cast<std::int8_t>(std::fabs(t - whole) >= 0.5f ? whole + std::copysign(1.0f, t) : whole));
  }
}

inline void write_32(BlockFormat format, const float* x, const float* w, Writer& to) {
  std::uint8_t codes[32];
  switch (format) {
    case BlockFormat::q4_0:
      to.half(0, one_scale<Whole<-8>>(x, w, codes));
      return to.halves(2, codes, 16);
    case BlockFormat::iq4_nl:
      to.half(0, one_scale<Codebook>(x, w, codes));
      return to.halves(2, codes, 16);
    case BlockFormat::q5_0:
      to.half(0, one_scale<Whole<-16>>(x, w, codes));
      to.fifth_bits(2, codes);
      return to.halves(6, codes, 16);
    case BlockFormat::q4_1:
    case BlockFormat::q5_1: {
      const bool five = format == BlockFormat::q5_1;
      const Line line = one_line(x, w, five ? 31.0f : 15.0f, codes);
      to.half(0, line.scale);
      to.half(2, -line.offset);
      if (five) to.fifth_bits(4, codes);
      return to.halves(five ? 8 : 4, codes, 16);
    }
    default:
      return write_q8_0(x, to);
  }
}

// --- super-blocks of 256 --------------------------------------------------------------------------------------------

template <int N>
struct Scaled {
  static constexpr int groups = kSuper / N;
  float unit = 0;  // one float16 for all groups
  int scales[groups] = {};
  std::uint8_t codes[kSuper] = {};
};

// x ≈ unit·s·q with whole s from Lowest to -Lowest - 1.
template <class Codes, int N, int Lowest>
inline Scaled<N> fit_scaled(const float* x, const float* w) {
  constexpr int groups = kSuper / N;
  float ideal[groups], peak = 0;
  for (int g = 0; g < groups; ++g) {
    ideal[g] = fit_scale<Codes, N>(x + g * N, w + g * N);
    peak = std::fabs(ideal[g]) > std::fabs(peak) ? ideal[g] : peak;
  }
  Scaled<N> best, now;
  float least = std::numeric_limits<float>::infinity();
  float unit = peak / Lowest;
  for (int round = 0; round < kRounds; ++round) {
    now.unit = as_half(unit);
    if (!std::isfinite(now.unit)) return now;
    const float inverse = inverse_of(now.unit);
    float error = 0, sxq = 0, sqq = 0;
    for (int g = 0; g < groups; ++g) {
      const float *xg = x + g * N, *wg = w + g * N;
      const int near = static_cast<int>(std::min(std::max(rounded(ideal[g] * inverse), Lowest + 0.0f), -1.0f - Lowest));
      float q[N], chosen[N] = {}, own = std::numeric_limits<float>::infinity();
      for (int s = std::max(near - 1, Lowest); s <= std::min(near + 1, -1 - Lowest); ++s) {
        const float e = encode<Codes, N>(xg, wg, now.unit * static_cast<float>(s), q);
        if (e < own) own = e, now.scales[g] = s, std::copy(q, q + N, chosen);
      }
      float xq[N], qq[N];
      for (int j = 0; j < N; ++j) {
        const float sq = static_cast<float>(now.scales[g]) * chosen[j];
        xq[j] = wg[j] * xg[j] * sq, qq[j] = wg[j] * sq * sq;
        now.codes[g * N + j] = static_cast<std::uint8_t>(Codes::index(chosen[j]));
      }
      error += own, sxq += total<N>(xq), sqq += total<N>(qq);
    }
    if (error < least) least = error, best = now;
    if (!(sqq > 0)) break;
    unit = sxq / sqq;
  }
  return best;
}

template <int N>
struct Lines {
  static constexpr int groups = kSuper / N;
  Line unit;  // two float16 for all groups
  int scales[groups] = {}, offsets[groups] = {};
  std::uint8_t codes[kSuper] = {};
};

// x ≈ unit.scale·s·q - unit.offset·m with q from 0 to top, whole s and m from 0 to `most`.
template <int N>
inline Lines<N> fit_lines(const float* x, const float* w, float top, int most) {
  constexpr int groups = kSuper / N;
  Line ideal[groups], unit;
  for (int g = 0; g < groups; ++g) {
    ideal[g] = fit_line<false, N>(x + g * N, w + g * N, top);
    unit = {std::max(unit.scale, ideal[g].scale), std::max(unit.offset, ideal[g].offset)};
  }
  unit = {unit.scale / static_cast<float>(most), unit.offset / static_cast<float>(most)};
  Lines<N> best, now;
  float least = std::numeric_limits<float>::infinity();
  for (int round = 0; round < kRounds; ++round) {
    now.unit = {as_half(unit.scale), as_half(unit.offset)};
    if (!std::isfinite(now.unit.scale) || !std::isfinite(now.unit.offset)) return now;
    const float per_scale = inverse_of(now.unit.scale), per_offset = inverse_of(now.unit.offset);
    // Normal equations of x ≈ scale·a - offset·m, a = s·q.
    float error = 0, aa = 0, am = 0, mm = 0, xa = 0, xm = 0;
    for (int g = 0; g < groups; ++g) {
      const float *xg = x + g * N, *wg = w + g * N;
      const auto whole = [most](float t) { return static_cast<int>(std::min(rounded(t), static_cast<float>(most))); };
      // Where the float16 of all scales is 0 only offsets are left: the best is the mean.
      const float offset = per_scale == 0 ? std::max(-total<N>(xg) / N, 0.0f) : ideal[g].offset;
      const int s0 = whole(ideal[g].scale * per_scale), m0 = whole(offset * per_offset);
      float q[N], chosen[N] = {}, own = std::numeric_limits<float>::infinity();
      for (int s = std::max(s0 - 1, 0); s <= std::min(s0 + 1, most); ++s)
        for (int m = std::max(m0 - 1, 0); m <= std::min(m0 + 1, most); ++m) {
          const Line line{now.unit.scale * static_cast<float>(s), now.unit.offset * static_cast<float>(m)};
          const float e = encode<N>(xg, wg, line, top, q);
          if (e < own) own = e, now.scales[g] = s, now.offsets[g] = m, std::copy(q, q + N, chosen);
        }
      float wa[N], waa[N], wx[N], wxa[N];
      for (int j = 0; j < N; ++j) {
        const float a = static_cast<float>(now.scales[g]) * chosen[j];
        wa[j] = wg[j] * a, waa[j] = wa[j] * a, wx[j] = wg[j] * xg[j], wxa[j] = wa[j] * xg[j];
        now.codes[g * N + j] = static_cast<std::uint8_t>(chosen[j]);
      }
      const float m = static_cast<float>(now.offsets[g]);
      error += own, aa += total<N>(waa), am += m * total<N>(wa), mm += m * m * total<N>(wg);
      xa += total<N>(wxa), xm += m * total<N>(wx);
    }
    if (error < least) least = error, best = now;
    const float determinant = aa * mm - am * am;
    if (determinant > 0) {
      unit = {(xa * mm - xm * am) / determinant, (xa * am - xm * aa) / determinant};
    } else {
      unit = {aa > 0 ? xa / aa : 0.0f, 0};
    }
    if (!(unit.scale > 0) || !(unit.offset >= 0)) break;
  }
  return best;
}

inline void write_q2_k(const float* x, const float* w, Writer& to) {
  const auto fit = fit_lines<16>(x, w, 3, 15);
  for (int g = 0; g < 16; ++g) to.out[g] = static_cast<std::uint8_t>(fit.scales[g] | fit.offsets[g] << 4);
  to.two_bits(16, fit.codes);
  to.half(80, fit.unit.scale);
  to.half(82, fit.unit.offset);
}

inline void write_q3_k(const float* x, const float* w, Writer& to) {
  const auto fit = fit_scaled<Whole<-4>, 16, -32>(x, w);
  for (int i = 0; i < kSuper; ++i)  // the third bit of a code
    to.out[i % 32] = static_cast<std::uint8_t>(to.out[i % 32] | (fit.codes[i] >> 2) << i / 32);
  to.two_bits(32, fit.codes);
  for (int g = 0; g < 16; ++g) {
    const int s = fit.scales[g] + 32;
    to.out[96 + g % 8] = static_cast<std::uint8_t>(to.out[96 + g % 8] | (s & 15) << 4 * (g / 8));
    to.out[104 + g % 4] = static_cast<std::uint8_t>(to.out[104 + g % 4] | (s >> 4) << 2 * (g / 4));
  }
  to.half(108, fit.unit);
}

inline void write_q4_k_or_q5_k(bool five, const float* x, const float* w, Writer& to) {
  const auto fit = fit_lines<32>(x, w, five ? 31.0f : 15.0f, 63);
  to.half(0, fit.unit.scale);
  to.half(2, fit.unit.offset);
  std::uint8_t* packed = to.out + 4;
  for (int g = 0; g < 4; ++g) {
    packed[g] = static_cast<std::uint8_t>(fit.scales[g] | fit.scales[g + 4] >> 4 << 6);
    packed[g + 4] = static_cast<std::uint8_t>(fit.offsets[g] | fit.offsets[g + 4] >> 4 << 6);
    packed[g + 8] = static_cast<std::uint8_t>((fit.scales[g + 4] & 15) | fit.offsets[g + 4] << 4);
  }
  if (five)
    for (int i = 0; i < kSuper; ++i)
      to.out[16 + i % 32] = static_cast<std::uint8_t>(to.out[16 + i % 32] | (fit.codes[i] >> 4) << i / 32);
  for (int pair = 0; pair < 4; ++pair) to.halves((five ? 48 : 16) + 32 * pair, fit.codes + 64 * pair, 32);
}

inline void write_q6_k(const float* x, const float* w, Writer& to) {
  const auto fit = fit_scaled<Whole<-32>, 16, -128>(x, w);
  std::uint8_t high[kSuper];
  for (int i = 0; i < kSuper; ++i) high[i] = fit.codes[i] >> 4;
  for (int half = 0; half < 2; ++half) to.halves(64 * half, fit.codes + 128 * half, 64);
  to.two_bits(128, high);
  for (int g = 0; g < 16; ++g) to.out[192 + g] = static_cast<std::uint8_t>(fit.scales[g]);
  to.half(208, fit.unit);
}

inline void write_iq4_xs(const float* x, const float* w, Writer& to) {
  const auto fit = fit_scaled<Codebook, 32, -32>(x, w);
  to.half(0, fit.unit);
  for (int g = 0; g < 8; ++g) {
    const int s = fit.scales[g] + 32;
    to.out[2 + g / 4] = static_cast<std::uint8_t>(to.out[2 + g / 4] | (s >> 4) << 2 * (g % 4));
    to.out[4 + g / 2] = static_cast<std::uint8_t>(to.out[4 + g / 2] | (s & 15) << 4 * (g % 2));
    to.halves(8 + 16 * g, fit.codes + 32 * g, 16);
  }
}

inline void write_super(BlockFormat format, const float* x, const float* w, Writer& to) {
  switch (format) {
    case BlockFormat::q2_k:
      return write_q2_k(x, w, to);
    case BlockFormat::q3_k:
      return write_q3_k(x, w, to);
    case BlockFormat::q6_k:
      return write_q6_k(x, w, to);
    case BlockFormat::iq4_xs:
      return write_iq4_xs(x, w, to);
    default:
      return write_q4_k_or_q5_k(format == BlockFormat::q5_k, x, w, to);
  }
}

bool quantize_row(BlockFormat format, const float* x, const float* importance, std::int64_t columns,
                  std::uint8_t* out) {
  const BlockSize size = block_size(format);
  float alike[kSuper];
  std::fill(alike, alike + kSuper, 1.0f);
  bool fits = true;
  for (std::int64_t first = 0; first < columns; first += size.weights, out += size.bytes) {
    std::memset(out, 0, static_cast<std::size_t>(size.bytes));
    Writer to{out};
    const float* w = importance ? importance + first : alike;
    if (size.weights == kSuper) {
      write_super(format, x + first, w, to);
    } else {
      write_32(format, x + first, w, to);
    }
    fits = fits && to.fits;
  }
  return fits;
}

}  // namespace

extern const QuantizeKernels HERD_KERNELS;
const QuantizeKernels HERD_KERNELS{&quantize_row};

}  // namespace herd
