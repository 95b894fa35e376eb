// A decoder-only Llama on the CPU: weights packed for the kernels, and one call that runs a ragged batch through all
// layers. It knows tokens, positions and cache pages; what they mean is kept in Python (src/herd/engine).
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "herd/adapter.h"
#include "herd/engine_kernels.h"
#include "herd/large_pages.h"
#include "herd/memory.h"
#include "herd/team.h"
#include "herd/tiles.h"

namespace herd {

struct DecoderShape {
  int dim, layers, heads, kv_heads, head_dim, vocab;
  float norm_eps;
  bool qk_norm;       // queries and keys normalised after the rotation
  float temperature;  // of layers without rotation: ln(⌊(position + 1) / floor⌋ + 1)·temperature + 1; 0: none
  int temperature_floor;
  int experts, top_k;  // of mixture layers
  bool token_scales;   // int8 inputs of a product have one scale a row, not one a block
};

// One feed-forward network; a layer has one, or a shared one and its experts.
struct FeedForward {
  Matrix w1, w3, w2;  // gate, up, down
};

struct Layer {
  bool rotates = true;
  int chunk = 0;  // attention looks back to a multiple of this; 0: to the beginning
  const float *attention_norm = nullptr, *ffn_norm = nullptr;
  Matrix wq, wk, wv, wo;
  FeedForward ffn;
  Matrix router;
  std::vector<FeedForward> experts;
};

// Pages of keys and values for all sequences; memory is taken when a page is first written.
class Cache {
 public:
  Cache(const CacheShape& shape, std::int64_t pages);
  const CacheShape& shape() const { return shape_; }
  std::int64_t pages() const { return pages_; }
  void copy_page(std::int64_t from, std::int64_t to);
  CachedHead head(int layer, int head, const std::int32_t* pages) {
    return {&shape_, memory_.data() + (layer * shape_.heads + head) * shape_.head_bytes(), pages};
  }

 private:
  CacheShape shape_;
  std::int64_t pages_;
  Memory memory_;
};

// Tokens to append to one sequence: `rows` of them from `position` on. `pages` has a page for every position up to the
// last of them. `adapter`: null, or the changes to the weights for these rows.
struct Span {
  int rows;
  std::int64_t position;
  const std::int32_t* pages;
  const Adapter* adapter;
};

// One step's work. Rows are the spans' tokens one after the other; `wanted` rows get outputs, of which those that are
// not null are computed: logits [wanted, vocab], states after the last norm [wanted, dim], and the log-probability of
// one target each.
struct Step {
  const std::int32_t* tokens;
  std::vector<Span> spans;
  const float *cosine, *sine;  // [positions, head_dim / 2]
  std::vector<std::int32_t> wanted;
  float *logits = nullptr, *states = nullptr, *log_probabilities = nullptr;
  const std::int32_t* targets = nullptr;
  int vocabulary = 0;  // logits beyond so many are padding, and have no probability
};

class Engine {
 public:
  struct Spec {
    std::string name;
    Format format;
    std::int64_t rows, columns;
  };

  // `matrices` are all that will be loaded; their memory is one block. `layers`: rotates and chunk of each. `patience`:
  // of LargePages.
  Engine(const DecoderShape& shape, const std::vector<Layer>& layers, const std::vector<Spec>& matrices, int threads,
         std::vector<int> cpus, std::int64_t patience);
  ~Engine();

  // A matrix in a file's layout, row by row, from memory or from an open file; a norm's weights. Throws
  // std::invalid_argument for an unknown name or a wrong size, std::runtime_error when the file ends too early.
  void load(const std::string& name, const std::uint8_t* data, std::size_t bytes);
  void load_file(const std::string& name, int descriptor, std::int64_t offset, std::size_t bytes);
  void load_norm(const std::string& name, const float* data, std::size_t count);
  // All is loaded: find each layer's weights. Throws std::invalid_argument when something is missing.
  void ready();
  bool is_ready() const { return ready_; }

  // An adapter without changes, which load_delta fills: `layer` and "wq" … "w2" name the matrix, A is [rank, columns]
  // and B [rows, rank]. Throws std::invalid_argument for another matrix or a wrong shape.
  int add_adapter();
  void load_delta(int adapter, int layer, const std::string& matrix, int rank, const float* a, std::size_t a_count,
                  const float* b, std::size_t b_count);
  void remove_adapter(int adapter);
  const Adapter* adapter(int index) const;  // null for -1; throws std::invalid_argument when there is none

  // False when `interrupted` said so; the cache's new positions are then undefined.
  bool step(const Step& step, Cache& cache, const std::function<bool()>& interrupted);

  const DecoderShape& shape() const { return shape_; }
  std::int64_t weight_bytes() const { return static_cast<std::int64_t>(memory_.size()); }
  std::int64_t work_bytes() const;
  void settle() { large_pages_.wait(); }
  void before_fork() { large_pages_.stop(); }
  int threads() const { return team_.size(); }

 private:
  struct Buffers;
  class Pass;

  const Matrix& matrix_to_load(const std::string& name, std::size_t bytes) const;

  DecoderShape shape_;
  std::vector<Layer> layers_;
  std::map<std::string, Matrix> matrices_;
  std::map<std::string, std::vector<float>> norms_;
  Matrix embedding_, head_;
  const float* norm_ = nullptr;
  bool ready_ = false;
  Memory memory_;
  LargePages large_pages_;
  std::vector<std::unique_ptr<Adapter>> adapters_;
  Team team_;
  std::unique_ptr<Buffers> buffers_;
};

}  // namespace herd
