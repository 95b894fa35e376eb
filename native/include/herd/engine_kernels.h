// The arithmetic of the engine, compiled once per instruction set; engine code calls it through this table.
#pragma once

#include <cstdint>

#include "herd/tiles.h"

namespace herd {

enum class KvType : std::uint8_t { f32, bf16, int8 };

// The key/value cache: pages of `page_tokens` tokens (a multiple of 16). A page holds, for each layer and key/value
// head, tiles of 16 keys and then tiles of 16 values; a tile is [width][16] numbers, in an order of the type's own.
struct CacheShape {
  KvType type;
  int layers, heads, head_dim, page_tokens;

  int width() const { return (head_dim + 15) / 16 * 16; }
  std::int64_t tile_bytes() const {
    const std::int64_t numbers = 16 * width();
    return type == KvType::f32 ? 4 * numbers : type == KvType::bf16 ? 2 * numbers : numbers + 64;
  }
  std::int64_t head_bytes() const { return 2 * (page_tokens / 16) * tile_bytes(); }
  std::int64_t page_bytes() const { return layers * heads * head_bytes(); }
};

// Keys and values of one sequence, layer and head.
struct CachedHead {
  const CacheShape* shape;
  std::uint8_t* base;         // of that layer and head in page 0
  const std::int32_t* pages;  // of the sequence

  std::uint8_t* key_tile(std::int64_t token) const {
    const std::int64_t in_page = token % shape->page_tokens;
    return base + pages[token / shape->page_tokens] * shape->page_bytes() + in_page / 16 * shape->tile_bytes();
  }
  std::uint8_t* value_tile(std::int64_t token) const { return key_tile(token) + shape->head_bytes() / 2; }
};

// Queries of neighbouring rows of one sequence that read the same key/value head.
struct Queries {
  int rows, heads;          // heads: query heads of each row
  const float* q;           // of the first row's first head, [head_dim] each
  std::int64_t row_stride;  // between rows of q
  float* out;               // as q
  std::int64_t out_stride;
  float scale;            // of scores
  std::int64_t position;  // of the first row
  std::int64_t chunk;     // 0, or the length of the chunks whose beginning a row cannot look past
};

struct EngineKernels {
  Inputs (*inputs_of)(Format format);
  // y[m][0 … 16) (+)= x[m] · (rows 16·strip … of w) for all rows m of x, as far as w has rows.
  void (*multiply)(const Matrix& w, std::int64_t strip, const Panel& x, float* y, std::int64_t stride, bool add);
  // Inputs 32·b … 32·b + 31 of one row into a panel. `largest`: what int8 codes reach to; 0: these values' own largest.
  void (*put_block)(const Panel& panel, int row, std::int64_t b, const float* values, float largest);
  // The largest magnitude of n values; those that are no numbers do not count.
  float (*largest)(const float* values, std::int64_t n);
  // The stored values of one row of a matrix.
  void (*read_row)(const Matrix& w, std::int64_t row, float* out);
  // out = x / rms(x) · weight (weight null: 1); out may be x.
  void (*normalise)(const float* x, const float* weight, float eps, std::int64_t n, float* out);
  // y[i] += rows[i] · x for `count` rows of n numbers.
  void (*add_dots)(const float* rows, std::int64_t count, std::int64_t n, const float* x, float* y);
  // out = silu(gate) · up.
  void (*swiglu)(const float* gate, const float* up, std::int64_t n, float* out);
  // Turns pairs (x[2j], x[2j+1]) of each head by the angles' cosines and sines.
  void (*rotate)(float* x, int heads, int head_dim, const float* cosine, const float* sine);
  // The key and value of a token into the cache.
  void (*put)(const CachedHead& cache, std::int64_t token, const float* key, const float* value);
  // softmax(q·k·scale)·v over the visible keys. `scratch` has attention_scratch(queries, width) floats.
  void (*attend)(const CachedHead& cache, const Queries& queries, float* scratch);
  // ln of the softmax of logits [n] at `target`.
  float (*log_probability)(const float* logits, std::int64_t n, std::int64_t target);
  // For measurements (probe.h).
  std::uint64_t (*read)(const std::uint8_t* p, std::int64_t bytes);
  std::int64_t (*int8_products)(std::int64_t rounds);
  std::int64_t (*f32_products)(std::int64_t rounds);
  std::int64_t (*bf16_products)(std::int64_t rounds);
};
extern const EngineKernels kEngineScalar, kEngineAvx2, kEngineAvx512, kEngineAvx512Vnni, kEngineAvx512Bf16, kEngineAmx;

constexpr int kKeyChunk = 256;  // keys whose softmax is taken together
constexpr int kQueries = 32;    // of a tile of queries, at most, unless one row has more heads
constexpr std::int64_t attention_scratch(int queries, int width) {
  return static_cast<std::int64_t>(queries) * (2 * width + kKeyChunk + 4);
}

const EngineKernels& engine_kernels();  // for the widest instruction set that may be used here

}  // namespace herd
