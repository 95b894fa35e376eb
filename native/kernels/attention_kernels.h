// The attention tiles, written once with compiler vectors and compiled once per instruction set: the including file
// defines HERD_KERNELS (name of the kernel set), HERD_LANES (floats in a vector), HERD_ACCUMULATORS (registers that a
// tile may hold) and HERD_BF16 where products are of bfloat16 pairs, with sums in 32 bits.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(HERD_BF16)
#include <immintrin.h>
#endif

#include "herd/attention.h"

namespace herd {
namespace {

constexpr int kLanes = HERD_LANES;
constexpr int kBlock = 64;  // queries and keys in a tile
constexpr float kInfinity = std::numeric_limits<float>::infinity();
typedef float Vector __attribute__((vector_size(4 * HERD_LANES), aligned(4), may_alias));
typedef std::int32_t Bits __attribute__((vector_size(4 * HERD_LANES), aligned(4), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }

// e^x to about 1 ulp: x = n·ln2 + r with ln2 in two parts, then a degree-6 polynomial of r in [-ln2/2, ln2/2].
inline Vector exponential(Vector x) {
  x = x < -87.0f ? Vector{} - 87.0f : x;
  const Vector shifted = x * 1.44269504f + 12582912.0f;  // 1.5·2^23: the integer lands in the low mantissa bits
  const Vector n = shifted - 12582912.0f;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = r * 1.3981999507e-3f + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Bits exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  Bits bits;
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

// By halves, so that it takes log2(kLanes) steps.
inline float sum(Vector v) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

inline float maximum(Vector v) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = std::max(v[i], v[i + half]);
  return v[0];
}

// Operands of products consist of units: one float, or two bfloat16 that are neighbours along the sum.
#if defined(HERD_BF16)
using Unit = std::uint32_t;
constexpr int kPair = 2;
inline __m512bh load_units(const Unit* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline Vector multiply_add(Vector acc, Unit x, __m512bh row) {
  return (Vector)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)), row);
}
inline __m512i interleave(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}
inline __m256i narrow(Vector x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
inline float dot(const Unit* a, const Unit* b, int units) {
  const auto load_8 = [](const Unit* p) { return (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  __m256 acc = _mm256_setzero_ps();
  for (int u = 0; u < units; u += 8) acc = _mm256_dpbf16_ps(acc, load_8(a + u), load_8(b + u));
  return sum((Vector)_mm512_zextps256_ps512(acc));
}
// Floats of one row as units along it, and of kPair rows as units across them.
inline void store_along(Unit* p, Vector x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
inline void store_across(Unit* p, const Vector* rows) {
  _mm512_storeu_si512(p, interleave(narrow(rows[0]), narrow(rows[1])));
}
#else
using Unit = float;
constexpr int kPair = 1;
inline Vector load_units(const Unit* p) { return load(p); }
inline Vector multiply_add(Vector acc, Unit x, Vector row) { return acc + x * row; }
inline float dot(const Unit* a, const Unit* b, int units) {
  Vector acc{};
  for (int u = 0; u < units; u += kLanes) acc += load(a + u) * load(b + u);
  return sum(acc);
}
inline void store_along(Unit* p, Vector x) { store(p, x); }
inline void store_across(Unit* p, const Vector* rows) { store(p, rows[0]); }
#endif

// c[i, j] (+)= Σ_u a(i, u) · b[u, j] for Rows × (Vectors·kLanes) values held in registers, with `depth` units in the
// sum. a(i, u) is a[i·lda + u], or a[u·lda + i] when Transposed.
template <int Rows, int Vectors, bool Transposed, bool Accumulate>
inline void register_tile(int depth, const Unit* a, int lda, const Unit* b, int ldb, float* c, int ldc) {
  Vector acc[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) acc[i][j] = Accumulate ? load(c + i * ldc + j * kLanes) : Vector{};
  for (int u = 0; u < depth; ++u) {
    decltype(load_units(b)) row[Vectors];
    for (int j = 0; j < Vectors; ++j) row[j] = load_units(b + u * ldb + j * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const Unit x = Transposed ? a[u * lda + i] : a[i * lda + u];
      for (int j = 0; j < Vectors; ++j) acc[i][j] = multiply_add(acc[i][j], x, row[j]);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) store(c + i * ldc + j * kLanes, acc[i][j]);
}

// The same for any rows × columns (columns a multiple of kLanes). Register tiles have 4 or 8 rows so that they divide
// kBlock: leftover rows run one by one, at a fraction of the speed.
template <bool Transposed, bool Accumulate>
void multiply(int rows, int columns, int depth, const Unit* a, int lda, const Unit* b, int ldb, float* c, int ldc) {
  const auto step = Transposed ? 1 : lda;
  const auto strip = [&]<int Vectors>(int j) {
    constexpr int kRows = HERD_ACCUMULATORS / Vectors >= 8 ? 8 : 4;
    int i = 0;
    for (; i + kRows <= rows; i += kRows)
      register_tile<kRows, Vectors, Transposed, Accumulate>(depth, a + i * step, lda, b + j, ldb, c + i * ldc + j, ldc);
    for (; i < rows; ++i)
      register_tile<1, Vectors, Transposed, Accumulate>(depth, a + i * step, lda, b + j, ldb, c + i * ldc + j, ldc);
  };
  constexpr int kWide = HERD_ACCUMULATORS / 4;
  int j = 0;
  for (; j + kWide * kLanes <= columns; j += kWide * kLanes) strip.template operator()<kWide>(j);
  if constexpr (kWide > 2)
    for (; j + 2 * kLanes <= columns; j += 2 * kLanes) strip.template operator()<2>(j);
  for (; j < columns; j += kLanes) strip.template operator()<1>(j);
}

// One (row, key/value head) pair of a tensor [B, S, N, K]: where its position s of head n begins.
struct Heads {
  int positions, heads, head_dim, row;
  std::int64_t at(int s, int n) const { return ((std::int64_t{row} * positions + s) * heads + n) * head_dim; }
};

// Positions [s, s + count) of a head: as units along its width, [count, K / kPair]; as units across positions,
// [⌈count / kPair⌉, K]; and back from floats [count, K].
#if defined(HERD_BF16)
__m256i load_16(const void* from, std::int64_t at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const std::uint16_t*>(from) + at));
}

void read_along(Number, const void* from, const Heads& heads, int head, int s, int count, Unit* out) {
  for (int i = 0; i < count; ++i)
    for (int d = 0; d < heads.head_dim; d += 16, out += 8)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), load_16(from, heads.at(s + i, head) + d));
}

void read_across(Number, const void* from, const Heads& heads, int head, int s, int count, Unit* out) {
  for (int i = 0; i < count; i += 2)
    for (int d = 0; d < heads.head_dim; d += 16, out += 16) {
      const __m256i even = load_16(from, heads.at(s + i, head) + d);
      const __m256i odd = i + 1 < count ? load_16(from, heads.at(s + i + 1, head) + d) : _mm256_setzero_si256();
      _mm512_storeu_si512(out, interleave(even, odd));
    }
}

void write_rows(Number, void* to, const Heads& heads, int head, int s, int count, const float* from) {
  for (int i = 0; i < count; ++i)
    for (int d = 0; d < heads.head_dim; d += 16) {
      auto* at = static_cast<std::uint16_t*>(to) + heads.at(s + i, head) + d;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), narrow(load(from + i * heads.head_dim + d)));
    }
}
#else
void read_along(Number number, const void* from, const Heads& heads, int head, int s, int count, Unit* out) {
  for (int i = 0; i < count; ++i) {
    const std::int64_t at = heads.at(s + i, head);
    float* row = out + i * heads.head_dim;
    if (number == Number::f32) std::memcpy(row, static_cast<const float*>(from) + at, 4 * std::size_t(heads.head_dim));
    for (int d = 0; number == Number::bf16 && d < heads.head_dim; ++d) {
      const std::uint32_t bits = std::uint32_t{static_cast<const std::uint16_t*>(from)[at + d]} << 16;
      std::memcpy(row + d, &bits, sizeof bits);
    }
  }
}

void read_across(Number number, const void* from, const Heads& heads, int head, int s, int count, Unit* out) {
  read_along(number, from, heads, head, s, count, out);
}

void write_rows(Number number, void* to, const Heads& heads, int head, int s, int count, const float* from) {
  for (int i = 0; i < count; ++i) {
    const std::int64_t at = heads.at(s + i, head);
    const float* row = from + i * heads.head_dim;
    if (number == Number::f32) std::memcpy(static_cast<float*>(to) + at, row, 4 * std::size_t(heads.head_dim));
    for (int d = 0; number == Number::bf16 && d < heads.head_dim; ++d) {
      std::uint32_t bits;
      std::memcpy(&bits, row + d, sizeof bits);
      const bool nan = (bits & 0x7fffffff) > 0x7f800000;
      bits = nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);  // round to nearest, ties to even
      static_cast<std::uint16_t*>(to)[at + d] = static_cast<std::uint16_t>(bits >> 16);
    }
  }
}
#endif

// Rows [S, units] → [units, padded S], so that scores vectorise over keys.
void transpose(const Unit* rows, int count, int units, int stride, Unit* out) {
  for (int s0 = 0; s0 < count; s0 += 16)
    for (int u = 0; u < units; ++u)
      for (int s = s0; s < std::min(count, s0 + 16); ++s) out[u * stride + s] = rows[s * units + u];
}

int rounded(int n) { return (n + kBlock - 1) / kBlock * kBlock; }

// Sets scores outside first … position to -∞ in a tile of queries [s0, s0+rows) and keys [t0, t0+kBlock).
void mask_tile(const std::int32_t* first, int s0, int rows, int t0, float* scores) {
  for (int i = 0; i < rows; ++i) {
    const int low = std::min(kBlock, std::max(0, first[s0 + i] - t0));
    const int high = std::max(0, std::min(kBlock, s0 + i + 1 - t0));
    float* row = scores + i * kBlock;
    std::fill(row, row + low, -kInfinity);
    std::fill(row + std::max(low, high), row + kBlock, -kInfinity);
  }
}

struct Range {
  int begin, end;  // key blocks' first and last + 1 position
  int full_from;   // keys from here on are seen by every query of the block as far as `first` is concerned
};

Range visible(const std::int32_t* first, int s0, int rows) {
  const auto [low, high] = std::minmax_element(first + s0, first + s0 + rows);
  return {*low / kBlock * kBlock, s0 + rows, *high};
}

bool needs_mask(const Range& range, int s0, int t0) { return t0 < range.full_from || t0 + kBlock - 1 > s0; }

void forward(const AttentionShape& shape, Number number, int task, const void* q, const void* k, const void* v, void* o,
             float* lse_BHS) {
  const int S = shape.positions, K = shape.head_dim, group = shape.heads / shape.kv_heads, stride = rounded(S);
  const int row = task / shape.kv_heads, kv = task % shape.kv_heads;
  const Heads keys{S, shape.kv_heads, K, row}, queries{S, shape.heads, K, row};
  const std::int32_t* first = shape.first_BS + std::int64_t{row} * S;
  const int U = K / kPair;
  const float scale = shape.scale;  // of scores: scaled queries would have to be rounded once more
  std::vector<Unit> k_SU(std::size_t(S) * U), k_US(std::size_t(U) * stride), v_across(std::size_t(stride) * U);
  read_along(number, k, keys, kv, 0, S, k_SU.data());
  transpose(k_SU.data(), S, U, stride, k_US.data());
  read_across(number, v, keys, kv, 0, S, v_across.data());
  std::vector<Unit> q_along(kBlock * U);
  std::vector<float> o_block(kBlock * K);
  alignas(64) float scores[kBlock * kBlock];
  alignas(64) Unit p_along[kBlock * kBlock / kPair];
  float highest[kBlock], total[kBlock];
  for (int head = kv * group; head < (kv + 1) * group; ++head) {
    for (int s0 = 0; s0 < S; s0 += kBlock) {
      const int rows = std::min(kBlock, S - s0);
      read_along(number, q, queries, head, s0, rows, q_along.data());
      std::fill(o_block.begin(), o_block.end(), 0.0f);
      std::fill(highest, highest + rows, -kInfinity);
      std::fill(total, total + rows, 0.0f);
      const Range range = visible(first, s0, rows);
      for (int t0 = range.begin; t0 < range.end; t0 += kBlock) {
        multiply<false, false>(rows, kBlock, U, q_along.data(), U, &k_US[t0], stride, scores, kBlock);
        if (needs_mask(range, s0, t0)) mask_tile(first, s0, rows, t0, scores);
        for (int i = 0; i < rows; ++i) {
          const float* line = scores + i * kBlock;
          Unit* p_line = p_along + i * kBlock / kPair;
          Vector top = load(line);
          for (int j = kLanes; j < kBlock; j += kLanes) {
            const Vector x = load(line + j);
            top = x > top ? x : top;
          }
          const float best = std::max(highest[i], maximum(top));
          Vector part{};  // stays 0 where nothing is visible yet, and not a number where a score is none
          for (int j = 0; j < kBlock; j += kLanes) {
            const Vector x = load(line + j);
            const Vector p = x == -kInfinity ? Vector{} : exponential(scale * (x - best));
            store_along(p_line + j / kPair, p);
            part += p;
          }
          if (best > highest[i]) {
            const float shrink = std::exp(scale * (highest[i] - best));
            total[i] *= shrink;
            for (int d = 0; d < K; d += kLanes) store(&o_block[i * K + d], load(&o_block[i * K + d]) * shrink);
            highest[i] = best;
          }
          total[i] += sum(part);
        }
        multiply<false, true>(rows, K, kBlock / kPair, p_along, kBlock / kPair, &v_across[std::size_t(t0) * U], K,
                              o_block.data(), K);
      }
      float* lse = lse_BHS + (std::int64_t{row} * shape.heads + head) * S + s0;
      for (int i = 0; i < rows; ++i) {
        const float inverse = 1.0f / total[i];
        for (int d = 0; d < K; ++d) o_block[i * K + d] *= inverse;
        lse[i] = scale * highest[i] + std::log(total[i]);
      }
      write_rows(number, o, queries, head, s0, rows, o_block.data());
    }
  }
}

void backward(const AttentionShape& shape, Number number, int task, const void* q, const void* k, const void* v,
              const void* o, const void* grad_o, const float* lse_BHS, void* grad_q, void* grad_k, void* grad_v) {
  const int S = shape.positions, K = shape.head_dim, group = shape.heads / shape.kv_heads, stride = rounded(S);
  const int row = task / shape.kv_heads, kv = task % shape.kv_heads;
  const Heads keys{S, shape.kv_heads, K, row}, queries{S, shape.heads, K, row};
  const std::int32_t* first = shape.first_BS + std::int64_t{row} * S;
  const int U = K / kPair;
  const float scale = shape.scale;
  const std::size_t size = std::size_t(stride) * U;
  std::vector<Unit> rows_SU(std::size_t(S) * U), k_US(size), v_US(size), k_across(size);
  read_along(number, k, keys, kv, 0, S, rows_SU.data());
  transpose(rows_SU.data(), S, U, stride, k_US.data());
  read_along(number, v, keys, kv, 0, S, rows_SU.data());
  transpose(rows_SU.data(), S, U, stride, v_US.data());
  read_across(number, k, keys, kv, 0, S, k_across.data());
  std::vector<float> dk_SK(std::size_t(stride) * K), dv_SK(std::size_t(stride) * K), dq_block(kBlock * K);
  std::vector<Unit> q_along(kBlock * U), o_along(kBlock * U), do_along(kBlock * U);
  std::vector<Unit> q_across(kBlock * U), do_across(kBlock * U);
  alignas(64) float scores[kBlock * kBlock], slopes[kBlock * kBlock];
  alignas(64) Unit p_across[kBlock * kBlock / kPair], ds_across[kBlock * kBlock / kPair];
  alignas(64) Unit ds_along[kBlock * kBlock / kPair];
  float delta[kBlock];
  for (int head = kv * group; head < (kv + 1) * group; ++head) {
    const float* lse = lse_BHS + (std::int64_t{row} * shape.heads + head) * S;
    for (int s0 = 0; s0 < S; s0 += kBlock) {
      const int rows = std::min(kBlock, S - s0);
      read_along(number, q, queries, head, s0, rows, q_along.data());
      read_along(number, o, queries, head, s0, rows, o_along.data());
      read_along(number, grad_o, queries, head, s0, rows, do_along.data());
      read_across(number, q, queries, head, s0, rows, q_across.data());
      read_across(number, grad_o, queries, head, s0, rows, do_across.data());
      // Σ_t p·dp of a row equals do · o
      for (int i = 0; i < rows; ++i) delta[i] = dot(&o_along[i * U], &do_along[i * U], U);
      std::fill(dq_block.begin(), dq_block.end(), 0.0f);
      const Range range = visible(first, s0, rows);
      for (int t0 = range.begin; t0 < range.end; t0 += kBlock) {
        multiply<false, false>(rows, kBlock, U, q_along.data(), U, &k_US[t0], stride, scores, kBlock);
        multiply<false, false>(rows, kBlock, U, do_along.data(), U, &v_US[t0], stride, slopes, kBlock);
        if (needs_mask(range, s0, t0)) mask_tile(first, s0, rows, t0, scores);
        for (int i = 0; i < rows; i += kPair)
          for (int j = 0; j < kBlock; j += kLanes) {
            Vector p[kPair]{}, ds[kPair]{};
            for (int r = 0; r < kPair && i + r < rows; ++r) {
              const Vector x = load(scores + (i + r) * kBlock + j);
              p[r] = x == -kInfinity ? Vector{} : exponential(scale * x - lse[s0 + i + r]);
              ds[r] = p[r] * (load(slopes + (i + r) * kBlock + j) - delta[i + r]);
              store_along(ds_along + ((i + r) * kBlock + j) / kPair, ds[r]);
            }
            store_across(p_across + i / kPair * kBlock + j, p);
            store_across(ds_across + i / kPair * kBlock + j, ds);
          }
        const int depth = (rows + kPair - 1) / kPair;
        const std::size_t t = std::size_t(t0) * K;
        multiply<true, true>(kBlock, K, depth, p_across, kBlock, do_across.data(), K, &dv_SK[t], K);
        multiply<true, true>(kBlock, K, depth, ds_across, kBlock, q_across.data(), K, &dk_SK[t], K);
        multiply<false, true>(rows, K, kBlock / kPair, ds_along, kBlock / kPair, &k_across[t / kPair], K,
                              dq_block.data(), K);
      }
      for (float& x : dq_block) x *= scale;
      write_rows(number, grad_q, queries, head, s0, rows, dq_block.data());
    }
  }
  for (float& x : dk_SK) x *= scale;
  write_rows(number, grad_k, keys, kv, 0, S, dk_SK.data());
  write_rows(number, grad_v, keys, kv, 0, S, dv_SK.data());
}

}  // namespace

const AttentionKernels HERD_KERNELS{&forward, &backward};

}  // namespace herd
