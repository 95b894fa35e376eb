// What stands between the matrix products of a decoder layer: norm, rotation, activation, attention over the cache.
// Every function works on one row, or on rows apart: no row's bits depend on another row.
#pragma once

#include "herd/engine_kernels.h"
#include "vectors.h"

namespace herd {
namespace {

void normalise(const float* x, const float* weight, float eps, std::int64_t n, float* out) {
  Floats squares[2] = {};
  in_vectors(n, [&](std::int64_t i, int lanes) {
    const Floats v = load_some(x + i, lanes);
    squares[i / kLanes % 2] += v * v;
  });
  const float factor = 1.0f / std::sqrt(sum(squares[0] + squares[1]) / static_cast<float>(n) + eps);
  in_vectors(n, [&](std::int64_t i, int lanes) {
    const Floats v = load_some(x + i, lanes) * factor;
    store_some(out + i, weight ? v * load_some(weight + i, lanes) : v, lanes);
  });
}

void add_dots(const float* rows, std::int64_t count, std::int64_t n, const float* x, float* y) {
  for (std::int64_t r = 0; r < count; ++r, rows += n) {
    Floats sums{};
    in_vectors(n, [&](std::int64_t i, int lanes) { sums += load_some(rows + i, lanes) * load_some(x + i, lanes); });
    y[r] += sum(sums);
  }
}

void swiglu(const float* gate, const float* up, std::int64_t n, float* out) {
  in_vectors(n, [&](std::int64_t i, int lanes) {
    const Floats g = load_some(gate + i, lanes);
    store_some(out + i, g / (1.0f + exponential(-g)) * load_some(up + i, lanes), lanes);
  });
}

void rotate(float* x, int heads, int head_dim, const float* cosine, const float* sine) {
  for (int h = 0; h < heads; ++h, x += head_dim)
    for (int j = 0; j < head_dim / 2; ++j) {
      const float a = x[2 * j], b = x[2 * j + 1];
      x[2 * j] = a * cosine[j] - b * sine[j];
      x[2 * j + 1] = a * sine[j] + b * cosine[j];
    }
}

float log_probability(const float* logits, std::int64_t n, std::int64_t target) {
  float largest = -kInfinity;
  for (std::int64_t i = 0; i < n; ++i) largest = logits[i] > largest ? logits[i] : largest;
  double total = 0;
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) total += sum(exponential(load(logits + i) - largest));
  for (; i < n; ++i) total += std::exp(logits[i] - largest);
  return static_cast<float>(static_cast<double>(logits[target] - largest) - std::log(total));
}

// The cache's number types. Scores and sums take N queries at a time. Where a type multiplies in fewer bits than 32,
// queries and weights are rounded in place: what was a row of floats begins with that many numbers of its own. The sum
// that weights are divided by is that of the rounded ones.
struct KvF32 {
  static constexpr int kWeights = 16;  // floats that the weights of a tile's keys take
  static Floats rounded(Floats x) { return x; }
  static void round(float*, int) {}
  static void put_key(std::uint8_t* tile, int lane, int width, const float* x) {
    auto* p = reinterpret_cast<float*>(tile);
    for (int k = 0; k < width; ++k) p[16 * k + lane] = x[k];
  }
  static void put_value(std::uint8_t* tile, int lane, int width, const float* x) {
    std::memcpy(reinterpret_cast<float*>(tile) + lane * width, x, sizeof(float) * static_cast<std::size_t>(width));
  }
  template <int N>
  static void scores(const std::uint8_t* tile, int width, const float* q, std::int64_t stride, Floats* s) {
    const auto* keys = reinterpret_cast<const float*>(tile);
    for (int n = 0; n < N; ++n) s[n] = Floats{};
    for (int k = 0; k < width; ++k) {
      const Floats key = load(keys + 16 * k);
      for (int n = 0; n < N; ++n) s[n] += key * q[n * stride + k];
    }
  }
  template <int N, int Vectors>
  static void add_values(const std::uint8_t* tile, int width, int at, const float* p, std::int64_t stride,
                         Floats (*o)[Vectors]) {
    for (int j = 0; j < 16; ++j) {
      const auto* values = reinterpret_cast<const float*>(tile) + j * width + at;
      for (int v = 0; v < Vectors; ++v) {
        const Floats value = load(values + 16 * v);
        for (int n = 0; n < N; ++n) o[n][v] += value * p[n * stride + j];
      }
    }
  }
};

struct KvInt8 {
  static constexpr int kWeights = 16;
  static Floats rounded(Floats x) { return x; }
  static void round(float*, int) {}
  static float* scales(std::uint8_t* tile, int width) { return reinterpret_cast<float*>(tile + 16 * width); }
  static float quantise(const float* x, int width, std::int8_t* codes) {
    float largest = 0, poison = 0;
    for (int k = 0; k < width; ++k) largest = std::max(largest, std::fabs(x[k])), poison += x[k] * 0.0f;
    const float quotient = 127.0f / largest, inverse = quotient < kInfinity && poison == 0 ? quotient : 0.0f;
    for (int k = 0; k < width; ++k) codes[k] = static_cast<std::int8_t>(std::lrintf(inverse == 0 ? 0 : x[k] * inverse));
    return largest / 127.0f + poison;
  }
  static void put_key(std::uint8_t* tile, int lane, int width, const float* x) {
    std::int8_t codes[1024];
    scales(tile, width)[lane] = quantise(x, width, codes);
    for (int k = 0; k < width; ++k) tile[16 * k + lane] = static_cast<std::uint8_t>(codes[k]);
  }
  static void put_value(std::uint8_t* tile, int lane, int width, const float* x) {
    scales(tile, width)[lane] = quantise(x, width, reinterpret_cast<std::int8_t*>(tile) + lane * width);
  }
  template <int N>
  static void scores(const std::uint8_t* tile, int width, const float* q, std::int64_t stride, Floats* s) {
    for (int n = 0; n < N; ++n) s[n] = Floats{};
    for (int k = 0; k < width; ++k) {
      const Floats key = from_signed(tile + 16 * k);
      for (int n = 0; n < N; ++n) s[n] += key * q[n * stride + k];
    }
    const Floats scale = load(tile + 16 * width);
    for (int n = 0; n < N; ++n) s[n] *= scale;
  }
  template <int N, int Vectors>
  static void add_values(const std::uint8_t* tile, int width, int at, const float* p, std::int64_t stride,
                         Floats (*o)[Vectors]) {
    float weights[N][16];
    const Floats scale = load(tile + 16 * width);
    for (int n = 0; n < N; ++n) store(weights[n], load(p + n * stride) * scale);
    for (int j = 0; j < 16; ++j)
      for (int v = 0; v < Vectors; ++v) {
        const Floats value = from_signed(tile + j * width + at + 16 * v);
        for (int n = 0; n < N; ++n) o[n][v] += value * weights[n][j];
      }
  }
};

// bfloat16: keys in pairs along the width, [width/2][16 keys][2]; values in pairs of keys, [8][width][2].
struct KvBf16 {
#if defined(__AVX512BF16__)
  static constexpr int kWeights = 8;
  static Floats rounded(Floats x) { return (Floats)_mm512_cvtpbh_ps(_mm512_cvtneps_pbh((__m512)x)); }
  static void round(float* x, int n) {  // n: a multiple of 16
    auto* to = reinterpret_cast<std::uint16_t*>(x);
    for (int i = 0; i < n; i += 16) {
      const auto few = (__m256i)_mm512_cvtneps_pbh((__m512)load(x + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), few);
    }
  }
  static std::uint32_t pair(const float* row, int i) {
    std::uint32_t both;
    std::memcpy(&both, row + i, 4);
    return both;
  }
#else
  static constexpr int kWeights = 16;
  static Floats rounded(Floats x) { return x; }
  static void round(float*, int) {}
#endif
  static void put_key(std::uint8_t* tile, int lane, int width, const float* x) {
    auto* p = reinterpret_cast<std::uint16_t*>(tile);
    for (int k = 0; k < width; ++k) p[(k / 2 * 16 + lane) * 2 + k % 2] = to_bf16(x[k]);
  }
  static void put_value(std::uint8_t* tile, int lane, int width, const float* x) {
    auto* p = reinterpret_cast<std::uint16_t*>(tile);
    for (int k = 0; k < width; ++k) p[(lane / 2 * width + k) * 2 + lane % 2] = to_bf16(x[k]);
  }
  template <int N>
  static void scores(const std::uint8_t* tile, int width, const float* q, std::int64_t stride, Floats* s) {
    for (int n = 0; n < N; ++n) s[n] = Floats{};
#if defined(__AVX512BF16__)
    Floats odd_sum[N] = {};
    for (int k = 0; k < width / 2; k += 2) {
      const Words even = load<Words>(tile + 64 * k), odd = load<Words>(tile + 64 * k + 64);
      for (int n = 0; n < N; ++n) {
        s[n] = add_pairs(s[n], pair(q + n * stride, k), even);
        odd_sum[n] = add_pairs(odd_sum[n], pair(q + n * stride, k + 1), odd);
      }
    }
    for (int n = 0; n < N; ++n) s[n] += odd_sum[n];
#else
    for (int k = 0; k < width / 2; ++k) {
      const Words keys = load<Words>(tile + 64 * k);
      const Floats even = even_bf16(keys), odd = odd_bf16(keys);
      for (int n = 0; n < N; ++n) {
        s[n] += even * q[n * stride + 2 * k];
        s[n] += odd * q[n * stride + 2 * k + 1];
      }
    }
#endif
  }
  template <int N, int Vectors>
  static void add_values(const std::uint8_t* tile, int width, int at, const float* p, std::int64_t stride,
                         Floats (*o)[Vectors]) {
#if defined(__AVX512BF16__)
    for (int j = 0; j < 8; ++j)
      for (int v = 0; v < Vectors; ++v) {
        const Words values = load<Words>(tile + 4 * (j * width + at + 16 * v));
        for (int n = 0; n < N; ++n) o[n][v] = add_pairs(o[n][v], pair(p + n * stride, j), values);
      }
#else
    for (int j = 0; j < 8; ++j)
      for (int v = 0; v < Vectors; ++v) {
        const Words values = load<Words>(tile + 4 * (j * width + at + 16 * v));
        const Floats even = even_bf16(values), odd = odd_bf16(values);
        for (int n = 0; n < N; ++n) {
          o[n][v] += even * p[n * stride + 2 * j];
          o[n][v] += odd * p[n * stride + 2 * j + 1];
        }
      }
#endif
  }
};

// o[n][0 … width) += Σ p·v over the tiles of a chunk, for N queries.
template <class Kv, int N>
void add_chunk(const std::uint8_t* const* tiles, int n_tiles, int width, const float* p, float* o) {
  const auto columns = [&]<int Vectors>(int at) {
    Floats sums[N][Vectors];
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < Vectors; ++v) sums[n][v] = Floats{};
    for (int t = 0; t < n_tiles; ++t)
      Kv::template add_values<N, Vectors>(tiles[t], width, at, p + Kv::kWeights * t, kKeyChunk, sums);
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < Vectors; ++v) {
        float* to = o + n * width + at + 16 * v;
        store(to, load(to) + sums[n][v]);
      }
  };
  int at = 0;
  for (; at + 64 <= width; at += 64) columns.template operator()<4>(at);
  for (; at < width; at += 16) columns.template operator()<1>(at);
}

// Attention of a tile of queries, chunk after chunk of keys. Within a chunk the softmax is plain; between chunks sums
// are rescaled to the larger maximum (Milakov and Gimelshein, arXiv 1805.02867). Chunks begin at multiples of
// kKeyChunk, and a masked key adds an exact zero (no cached value is infinite or no number, see put), so a query's bits
// depend on its own keys alone.
template <class Kv>
void attend_with(const CachedHead& cache, const Queries& x, float* scratch) {
  const int width = cache.shape->width(), head_dim = cache.shape->head_dim, count = x.rows * x.heads;
  float* const scaled = scratch;
  float* const sums = scaled + count * width;
  float* const p = sums + count * width;
  float* const largest = p + count * kKeyChunk;
  float* const total = largest + count;
  for (int n = 0; n < count; ++n) {
    const float* q = x.q + n / x.heads * x.row_stride + n % x.heads * head_dim;
    for (int k = 0; k < width; ++k) scaled[n * width + k] = k < head_dim ? q[k] * x.scale : 0.0f;
    Kv::round(scaled + n * width, width);
    largest[n] = -kInfinity, total[n] = 0;
  }
  std::fill(sums, sums + count * width, 0.0f);
  const auto first_of = [&x](std::int64_t position) { return x.chunk ? position / x.chunk * x.chunk : 0; };
  const std::int64_t first = first_of(x.position), last = x.position + x.rows - 1;

  for (std::int64_t chunk = first / kKeyChunk * kKeyChunk; chunk <= last; chunk += kKeyChunk) {
    const std::uint8_t *keys[kKeyChunk / 16], *values[kKeyChunk / 16];
    const int n_tiles = static_cast<int>(std::min<std::int64_t>(kKeyChunk, last + 1 - chunk) + 15) / 16;
    for (int t = 0; t < n_tiles; ++t) {
      keys[t] = cache.key_tile(chunk + 16 * t), values[t] = cache.value_tile(chunk + 16 * t);
    }
    for (int t = 0; t < n_tiles; ++t) {
      const auto take = [&]<int N>(int n) {
        Floats s[N];
        Kv::template scores<N>(keys[t], width, scaled + n * width, width, s);
        for (int i = 0; i < N; ++i) store(p + (n + i) * kKeyChunk + 16 * t, s[i]);
      };
      int n = 0;
      for (; n + 8 <= count; n += 8) take.template operator()<8>(n);
      for (; n + 4 <= count; n += 4) take.template operator()<4>(n);
      for (; n < count; ++n) take.template operator()<1>(n);
    }
    for (int n = 0; n < count; ++n) {
      float* row = p + n * kKeyChunk;
      const std::int64_t position = x.position + n / x.heads;
      const auto clamped = [&](std::int64_t i) {
        return static_cast<int>(std::clamp<std::int64_t>(i, 0, 16 * n_tiles));
      };
      const int begin = clamped(first_of(position) - chunk), end = clamped(position + 1 - chunk);
      if (begin >= end) {  // it sees none of these keys
        std::fill(row, row + 16 * n_tiles, 0.0f);
        continue;
      }
      std::fill(row, row + begin, -kInfinity);
      std::fill(row + end, row + 16 * n_tiles, -kInfinity);
      Floats highest = Floats{} - kInfinity;
      for (int i = 0; i < 16 * n_tiles; i += 16) highest = larger(highest, load(row + i));
      const float top = std::max(largest[n], maximum(highest));
      Floats weights{};
      for (int i = 0; i < 16 * n_tiles; i += 16) {
        const Floats s = load(row + i);
        const Floats e = Kv::rounded(exponential(s - top));
        store(row + i, e);
        weights += e;
      }
      if (top != largest[n]) {
        const float shrink = largest[n] == -kInfinity ? 0.0f : std::exp(largest[n] - top);
        total[n] *= shrink;
        for (int k = 0; k < width; k += 16) store(sums + n * width + k, load(sums + n * width + k) * shrink);
        largest[n] = top;
      }
      total[n] += sum(weights);
      Kv::round(row, 16 * n_tiles);
    }
    int n = 0;
    for (; n + 4 <= count; n += 4) add_chunk<Kv, 4>(values, n_tiles, width, p + n * kKeyChunk, sums + n * width);
    for (; n < count; ++n) add_chunk<Kv, 1>(values, n_tiles, width, p + n * kKeyChunk, sums + n * width);
  }
  for (int n = 0; n < count; ++n) {
    float* out = x.out + n / x.heads * x.out_stride + n % x.heads * head_dim;
    for (int k = 0; k < head_dim; ++k) out[k] = sums[n * width + k] / total[n];
  }
}

template <class Function>
void with_kv(KvType type, const Function& f) {
  switch (type) {
    case KvType::f32:
      return f(KvF32{});
    case KvType::bf16:
      return f(KvBf16{});
    case KvType::int8:
      return f(KvInt8{});
  }
}

// A row's key and value into its lane of their tiles. A value that is no number, or too large for bfloat16, is stored
// as zeros with a key that is no number: who may see it gets no number, and nobody else is touched, neither rows of the
// same tile of queries nor the page's next user.
void put(const CachedHead& cache, std::int64_t token, const float* key, const float* value) {
  constexpr float kLargest = 3.3895313e38f;  // of bfloat16
  const int width = cache.shape->width(), head_dim = cache.shape->head_dim, lane = static_cast<int>(token % 16);
  const bool usable = std::all_of(value, value + head_dim, [](float x) { return std::fabs(x) <= kLargest; });
  float row[1024];
  std::fill(row + head_dim, row + width, 0.0f);
  with_kv(cache.shape->type, [&](auto kv) {
    using Kv = decltype(kv);
    for (int k = 0; k < head_dim; ++k) row[k] = usable ? key[k] : std::numeric_limits<float>::quiet_NaN();
    Kv::put_key(cache.key_tile(token), lane, width, row);
    for (int k = 0; k < head_dim; ++k) row[k] = usable ? value[k] : 0.0f;
    Kv::put_value(cache.value_tile(token), lane, width, row);
  });
}

void attend(const CachedHead& cache, const Queries& queries, float* scratch) {
  with_kv(cache.shape->type, [&](auto kv) { attend_with<decltype(kv)>(cache, queries, scratch); });
}

}  // namespace
}  // namespace herd
