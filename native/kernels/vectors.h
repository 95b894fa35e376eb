// Vectors of 16 lanes, in as many registers as the instruction set needs, and the functions of them that compilers do
// not find by themselves.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "herd/half.h"
#include "twin.h"

namespace herd {
namespace {

constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
#if defined(__AVX512F__)
typedef float Floats __attribute__((vector_size(64)));
typedef std::int32_t Ints __attribute__((vector_size(64)));
typedef std::uint32_t Words __attribute__((vector_size(64)));
typedef std::uint8_t Codes __attribute__((vector_size(64)));
#else
using Floats = Twin<float>;
using Ints = Twin<std::int32_t>;
using Words = Twin<std::uint32_t>;
using Codes = Twin<std::uint8_t>;
#endif

#if defined(__AVX512F__)
template <class V = Floats>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
template <class To, class From>
inline To bits(From from) {
  return (To)from;
}
#else
template <class V = Floats>
inline V load(const void* p) {
  typename V::Half low, high;
  std::memcpy(&low, p, 32), std::memcpy(&high, static_cast<const char*>(p) + 32, 32);
  return {{low, high}};
}
template <class V>
inline void store(void* p, V v) {
  std::memcpy(p, &v.h[0], 32), std::memcpy(static_cast<char*>(p) + 32, &v.h[1], 32);
}
template <class To, class From>
inline To bits(From from) {
  return {{(typename To::Half)from.h[0], (typename To::Half)from.h[1]}};
}
#endif

// The first n of 16 lanes.
inline Floats load_some(const float* p, int n) {
  if (n >= kLanes) return load(p);
  Floats v{};
  std::memcpy(&v, p, sizeof(float) * static_cast<std::size_t>(n));
  return v;
}
inline void store_some(float* p, Floats v, int n) {
  if (n >= kLanes) return store(p, v);
  std::memcpy(p, &v, sizeof(float) * static_cast<std::size_t>(n));
}

// f(i, lanes) for 0, 16, 32 … below n, the last one with the lanes that are left.
template <class Function>
inline void in_vectors(std::int64_t n, const Function& f) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, static_cast<int>(n - i));
}

// Sixteen numbers in memory as floats: float16, bytes without and with sign.
inline Floats from_halves(const void* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  const auto* q = static_cast<const __m128i*>(p);
  const __m256 both[2] = {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  return load(both);
#else
  std::uint16_t halves[16];
  std::memcpy(halves, p, sizeof halves);
  float v[16];
  for (int i = 0; i < 16; ++i) v[i] = half_to_float(halves[i]);
  return load(v);
#endif
}
inline Floats from_bytes(const void* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
  std::uint8_t bytes[16];
  std::memcpy(bytes, p, sizeof bytes);
  float v[16];
  for (int i = 0; i < 16; ++i) v[i] = bytes[i];
  return load(v);
#endif
}
inline Floats from_signed(const void* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
  std::int8_t bytes[16];
  std::memcpy(bytes, p, sizeof bytes);
  float v[16];
  for (int i = 0; i < 16; ++i) v[i] = bytes[i];
  return load(v);
#endif
}

// The even and the odd ones of 32 bfloat16.
inline Floats even_bf16(Words pairs) { return bits<Floats>(pairs << 16); }
inline Floats odd_bf16(Words pairs) { return bits<Floats>(pairs & 0xffff0000u); }

// Rounded to the nearest bfloat16, ties to even.
inline std::uint16_t to_bf16(float x) {
  std::uint32_t word;
  std::memcpy(&word, &x, 4);
  if (x != x) return static_cast<std::uint16_t>(word >> 16 | 0x40u);
  return static_cast<std::uint16_t>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

#if defined(__AVX512BF16__)
// sum[i] + the products of a pair of bfloat16 with the i-th pair of 16. Subnormal numbers count as zero.
inline Floats add_pairs(Floats sum, std::uint32_t pair, Words pairs) {
  const __m512i everywhere = _mm512_set1_epi32(static_cast<int>(pair));
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)everywhere, (__m512bh)pairs);
}
#endif

#if defined(__AVX512F__)
inline Floats convert(Ints v) { return __builtin_convertvector(v, Floats); }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
// v, but 0 where x is below the bound; v, but x where x is no number.
inline Floats zero_below(Floats x, float bound, Floats v) { return x < bound ? Floats{} : v; }
inline Floats number_or(Floats x, Floats v) { return x == x ? v : x; }
// x, but 0 where it is infinite or no number.
inline Floats finite(Floats x) { return x * 0.0f == 0.0f ? x : Floats{}; }
#else
inline Floats convert(Ints v) {
  return {{__builtin_convertvector(v.h[0], Floats::Half), __builtin_convertvector(v.h[1], Floats::Half)}};
}
inline Floats larger(Floats a, Floats b) {
  return {{a.h[0] > b.h[0] ? a.h[0] : b.h[0], a.h[1] > b.h[1] ? a.h[1] : b.h[1]}};
}
inline Floats smaller(Floats a, Floats b) {
  return {{a.h[0] < b.h[0] ? a.h[0] : b.h[0], a.h[1] < b.h[1] ? a.h[1] : b.h[1]}};
}
inline Floats zero_below(Floats x, float bound, Floats v) {
  return {{x.h[0] < bound ? Floats::Half{} : v.h[0], x.h[1] < bound ? Floats::Half{} : v.h[1]}};
}
inline Floats number_or(Floats x, Floats v) {
  return {{x.h[0] == x.h[0] ? v.h[0] : x.h[0], x.h[1] == x.h[1] ? v.h[1] : x.h[1]}};
}
inline Floats finite(Floats x) {
  return {{x.h[0] * 0.0f == 0.0f ? x.h[0] : Floats::Half{}, x.h[1] * 0.0f == 0.0f ? x.h[1] : Floats::Half{}}};
}
#endif

// Whole numbers from -128 to 127 as bytes.
inline void to_bytes(std::int8_t* p, Ints v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
#else
  std::int32_t lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::int8_t>(lanes[i]);
#endif
}

// By halves, so that it takes four steps and its order is the same everywhere.
template <class T, class V>
inline T folded(V v, T (*join)(T, T)) {
  T lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = join(lanes[i], lanes[i + half]);
  return lanes[0];
}
inline float sum(Floats v) {
  return folded<float>(v, [](float a, float b) { return a + b; });
}
inline std::int32_t sum(Ints v) {
  return folded<std::int32_t>(v, [](std::int32_t a, std::int32_t b) { return a + b; });
}
inline float maximum(Floats v) {
  return folded<float>(v, [](float a, float b) { return a > b ? a : b; });
}
inline Floats magnitude(Floats v) { return bits<Floats>(bits<Words>(v) & 0x7fffffffu); }

// e^x to about 1 ulp: x = n·ln2 + r with ln2 in two parts, then a degree-6 polynomial of r in [-ln2/2, ln2/2]. Below
// -87 the result is 0, above 88 that of 88; what is no number stays none.
inline Floats exponential(Floats x) {
  const Floats bounded = smaller(larger(x, Floats{} - 87.0f), Floats{} + 88.0f);
  const Floats shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5·2^23: the integer lands in the low mantissa bits
  const Floats n = shifted - 12582912.0f;
  const Floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.3981999507e-3f + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return number_or(x, zero_below(x, -87.0f, bits<Floats>(bits<Ints>(p) + (bits<Ints>(shifted) << 23))));
}

}  // namespace
}  // namespace herd
