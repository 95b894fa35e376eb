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

inline float sum(Vector v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

inline float maximum(Vector v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = std::max(best, v[i]);
  return best;
}

// Operands of products consist of units: one float, or two bfloat16 that are neighbours along the sum.
#if defined(HERD_BF16)
using Unit = std::uint32_t;
constexpr int kPair = 2;
inline __m512bh load_units(const Unit* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline Vector multiply_add(Vector acc, Unit x, __m512bh row) {
  return (Vector)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)), row);
}
#else
using Unit = float;
constexpr int kPair = 1;
inline Vector load_units(const Unit* p) { return load(p); }
inline Vector multiply_add(Vector acc, Unit x, Vector row) { return acc + x * row; }
#endif

// Rows [n, width] of floats (width a multiple of 16) as an operand. `along`: neighbours of a row share a unit,
// [n, width / kPair]. `across`: two rows' numbers at the same place do, [⌈n / kPair⌉, width]. The result is valid until
// the next call; where a unit is a float it is the rows themselves.
class Operand {
 public:
#if defined(HERD_BF16)
  const Unit* along(const float* rows, int n, int width) {
    const std::size_t size = std::size_t(n) * width;
    if (units_.size() < size / 2) units_.resize(size / 2);
    for (std::size_t i = 0; i < size; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(units_.data() + i / 2), (__m256i)narrow(rows + i));
    return units_.data();
  }
  const Unit* across(const float* rows, int n, int width) {
    const std::size_t size = std::size_t(n + 1) / 2 * width;
    if (units_.size() < size) units_.resize(size);
    for (int i = 0; i < n; i += 2)
      for (int j = 0; j < width; j += 16) {
        const float* even = rows + std::size_t(i) * width + j;
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)narrow(even));
        const __m512i high = i + 1 < n ? _mm512_cvtepu16_epi32((__m256i)narrow(even + width)) : _mm512_setzero_si512();
        _mm512_storeu_si512(units_.data() + std::size_t(i) / 2 * width + j,
                            _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    return units_.data();
  }

 private:
  static __m256bh narrow(const float* p) { return _mm512_cvtneps_pbh(_mm512_loadu_ps(p)); }
  std::vector<Unit> units_;
#else
  const Unit* along(const float* rows, int, int) { return rows; }
  const Unit* across(const float* rows, int, int) { return rows; }
#endif
};

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

float read(Number number, const void* p, std::int64_t i) {
  if (number == Number::f32) return static_cast<const float*>(p)[i];
  const std::uint32_t bits = std::uint32_t{static_cast<const std::uint16_t*>(p)[i]} << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

void write(Number number, void* p, std::int64_t i, float x) {
  if (number == Number::f32) {
    static_cast<float*>(p)[i] = x;
    return;
  }
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  bits = nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);  // round to nearest, ties to even
  static_cast<std::uint16_t*>(p)[i] = static_cast<std::uint16_t>(bits >> 16);
}

// One (row, key/value head) pair of a tensor [B, S, N, K]: where its position s of head n begins.
struct Heads {
  int positions, heads, head_dim, row;
  std::int64_t at(int s, int n) const {
    return ((std::int64_t{row} * positions + s) * heads + n) * head_dim;
  }
};

void read_rows(Number number, const void* from, const Heads& heads, int head, int s, int count, float* out) {
  for (int i = 0; i < count; ++i)
    for (int d = 0; d < heads.head_dim; ++d)
      out[i * heads.head_dim + d] = read(number, from, heads.at(s + i, head) + d);
}

void write_rows(Number number, void* to, const Heads& heads, int head, int s, int count, const float* from) {
  for (int i = 0; i < count; ++i)
    for (int d = 0; d < heads.head_dim; ++d)
      write(number, to, heads.at(s + i, head) + d, from[i * heads.head_dim + d]);
}

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
  int begin, end;      // key blocks' first and last + 1 position
  int full_from;       // keys from here on are seen by every query of the block as far as `first` is concerned
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
  // Scores are scaled, not queries: those would be rounded once more where products are of bfloat16.
  const float scale = shape.scale;
  std::vector<float> v_SK(std::size_t(stride) * K), k_SK(std::size_t(stride) * K);
  std::vector<Unit> k_US(std::size_t(U) * stride);
  Operand k_rows, v_rows, q_rows, p_rows;
  read_rows(number, k, keys, kv, 0, S, k_SK.data());
  read_rows(number, v, keys, kv, 0, S, v_SK.data());
  transpose(k_rows.along(k_SK.data(), S, K), S, U, stride, k_US.data());
  const Unit* v_across = v_rows.across(v_SK.data(), stride, K);
  std::vector<float> q_block(kBlock * K), o_block(kBlock * K);
  alignas(64) float scores[kBlock * kBlock];
  float highest[kBlock], total[kBlock];
  for (int head = kv * group; head < (kv + 1) * group; ++head) {
    for (int s0 = 0; s0 < S; s0 += kBlock) {
      const int rows = std::min(kBlock, S - s0);
      read_rows(number, q, queries, head, s0, rows, q_block.data());
      const Unit* q_along = q_rows.along(q_block.data(), rows, K);
      std::fill(o_block.begin(), o_block.end(), 0.0f);
      std::fill(highest, highest + rows, -kInfinity);
      std::fill(total, total + rows, 0.0f);
      const Range range = visible(first, s0, rows);
      for (int t0 = range.begin; t0 < range.end; t0 += kBlock) {
        multiply<false, false>(rows, kBlock, U, q_along, U, k_US.data() + t0, stride, scores, kBlock);
        if (needs_mask(range, s0, t0)) mask_tile(first, s0, rows, t0, scores);
        for (int i = 0; i < rows; ++i) {
          float* line = scores + i * kBlock;
          Vector top = load(line);
          for (int j = kLanes; j < kBlock; j += kLanes) {
            const Vector x = load(line + j);
            top = x > top ? x : top;
          }
          const float best = std::max(highest[i], maximum(top));
          if (best == -kInfinity) {  // nothing visible in this tile yet
            std::fill(line, line + kBlock, 0.0f);
            continue;
          }
          Vector part{};
          for (int j = 0; j < kBlock; j += kLanes) {
            const Vector x = load(line + j);
            const Vector p = x == -kInfinity ? Vector{} : exponential(scale * (x - best));
            store(line + j, p);
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
        multiply<false, true>(rows, K, kBlock / kPair, p_rows.along(scores, rows, kBlock), kBlock / kPair,
                              v_across + std::size_t(t0) / kPair * K, K, o_block.data(), K);
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
  const std::size_t size = std::size_t(stride) * K;
  std::vector<float> k_SK(size), v_SK(size), dk_SK(size), dv_SK(size);
  std::vector<Unit> k_US(size / kPair), v_US(size / kPair);
  Operand rows_along, k_rows, q_rows, q_columns, do_rows, do_columns, p_columns, ds_rows, ds_columns;
  read_rows(number, k, keys, kv, 0, S, k_SK.data());
  read_rows(number, v, keys, kv, 0, S, v_SK.data());
  transpose(rows_along.along(k_SK.data(), S, K), S, U, stride, k_US.data());
  transpose(rows_along.along(v_SK.data(), S, K), S, U, stride, v_US.data());
  const Unit* k_across = k_rows.across(k_SK.data(), stride, K);
  std::vector<float> q_block(kBlock * K), o_block(kBlock * K), do_block(kBlock * K), dq_block(kBlock * K);
  alignas(64) float scores[kBlock * kBlock], slopes[kBlock * kBlock];
  float delta[kBlock];
  for (int head = kv * group; head < (kv + 1) * group; ++head) {
    const float* lse = lse_BHS + (std::int64_t{row} * shape.heads + head) * S;
    for (int s0 = 0; s0 < S; s0 += kBlock) {
      const int rows = std::min(kBlock, S - s0);
      read_rows(number, q, queries, head, s0, rows, q_block.data());
      read_rows(number, o, queries, head, s0, rows, o_block.data());
      read_rows(number, grad_o, queries, head, s0, rows, do_block.data());
      for (int i = 0; i < rows; ++i) {  // Σ_t p·dp of a row equals do · o
        Vector dot{};
        for (int d = 0; d < K; d += kLanes) dot += load(&o_block[i * K + d]) * load(&do_block[i * K + d]);
        delta[i] = sum(dot);
      }
      const Unit *q_along = q_rows.along(q_block.data(), rows, K), *do_along = do_rows.along(do_block.data(), rows, K);
      const Unit* q_across = q_columns.across(q_block.data(), rows, K);
      const Unit* do_across = do_columns.across(do_block.data(), rows, K);
      std::fill(dq_block.begin(), dq_block.end(), 0.0f);
      const Range range = visible(first, s0, rows);
      for (int t0 = range.begin; t0 < range.end; t0 += kBlock) {
        multiply<false, false>(rows, kBlock, U, q_along, U, &k_US[t0], stride, scores, kBlock);
        multiply<false, false>(rows, kBlock, U, do_along, U, &v_US[t0], stride, slopes, kBlock);
        if (needs_mask(range, s0, t0)) mask_tile(first, s0, rows, t0, scores);
        for (int i = 0; i < rows; ++i) {
          for (int j = i * kBlock; j < (i + 1) * kBlock; j += kLanes) {
            const Vector x = load(scores + j);
            const Vector p = x == -kInfinity ? Vector{} : exponential(scale * x - lse[s0 + i]);
            store(scores + j, p);
            store(slopes + j, p * (load(slopes + j) - delta[i]));
          }
        }
        const std::size_t t = std::size_t(t0) * K;
        const int depth = (rows + kPair - 1) / kPair;
        const Unit* p_across = p_columns.across(scores, rows, kBlock);
        const Unit* ds_across = ds_columns.across(slopes, rows, kBlock);
        const Unit* ds_along = ds_rows.along(slopes, rows, kBlock);
        multiply<true, true>(kBlock, K, depth, p_across, kBlock, do_across, K, &dv_SK[t], K);
        multiply<true, true>(kBlock, K, depth, ds_across, kBlock, q_across, K, &dk_SK[t], K);
        multiply<false, true>(rows, K, kBlock / kPair, ds_along, kBlock / kPair, k_across + t / kPair, K,
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
