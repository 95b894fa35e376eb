// Weights and cache: what a model holds between steps. The step itself is in step.cpp.
#include "herd/engine.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "herd/isa.h"
#include "herd/parallel.h"
#include "step.h"

namespace herd {
namespace {

constexpr std::int64_t kSlack = 8192;         // kernels fetch ahead of what they read
constexpr std::int64_t kReadBytes = 1 << 18;  // of a file at a time

std::int64_t aligned(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

std::size_t total_bytes(const std::vector<Engine::Spec>& matrices) {
  std::int64_t total = kSlack;
  for (const auto& spec : matrices) total += aligned(Matrix{spec.format, spec.rows, spec.columns, nullptr}.bytes());
  return static_cast<std::size_t>(total);
}

}  // namespace

const EngineKernels& engine_kernels() {
#if defined(__x86_64__)
  const Isa isa = widest_isa();
  if (isa >= Isa::amx) return kEngineAmx;
  if (isa >= Isa::avx512_bf16) return kEngineAvx512Bf16;
  if (isa >= Isa::avx512_vnni) return kEngineAvx512Vnni;
  if (isa >= Isa::avx512) return kEngineAvx512;
  if (isa >= Isa::avx2) return kEngineAvx2;
#endif
  return kEngineScalar;
}

Cache::Cache(const CacheShape& shape, std::int64_t pages)
    : shape_(shape), pages_(pages), memory_(static_cast<std::size_t>(pages * shape.page_bytes())) {}

void Cache::copy_page(std::int64_t from, std::int64_t to) {
  if (from < 0 || to < 0 || from >= pages_ || to >= pages_) throw std::invalid_argument("no such page");
  const auto bytes = shape_.page_bytes();
  std::memcpy(memory_.data() + to * bytes, memory_.data() + from * bytes, static_cast<std::size_t>(bytes));
}

Engine::Engine(const DecoderShape& shape, const std::vector<Layer>& layers, const std::vector<Spec>& matrices,
               int threads, std::vector<int> cpus, std::int64_t patience)
    : shape_(shape),
      layers_(layers),
      memory_(total_bytes(matrices)),
      large_pages_(memory_, patience),
      team_(threads, std::move(cpus)),
      buffers_(std::make_unique<Buffers>()) {
  if (shape.head_dim > 1024 || shape.head_dim % 2) throw std::invalid_argument("head_dim is even, at most 1024");
  std::int64_t offset = 0;
  for (const auto& spec : matrices) {
    Matrix matrix{spec.format, spec.rows, spec.columns, memory_.data() + offset};
    offset += aligned(matrix.bytes());
    if (!matrices_.emplace(spec.name, matrix).second) throw std::invalid_argument("twice: " + spec.name);
  }
}

Engine::~Engine() = default;

const Matrix& Engine::matrix_to_load(const std::string& name, std::size_t bytes) const {
  const auto found = matrices_.find(name);
  if (found == matrices_.end()) throw std::invalid_argument("no such matrix: " + name);
  const Matrix& w = found->second;
  if (bytes != static_cast<std::size_t>(w.rows * stored_row_bytes(w.format, w.columns)))
    throw std::invalid_argument("wrong number of bytes for " + name);
  return w;
}

void Engine::load(const std::string& name, const std::uint8_t* data, std::size_t bytes) {
  const Matrix& w = matrix_to_load(name, bytes);
  const std::int64_t source_bytes = kStrip * stored_row_bytes(w.format, w.columns);
  parallel_for(static_cast<int>(w.strips()), team_.size(), [&](int s) {
    large_pages_.take(w.strip(s), w.strip_bytes());
    pack_strip(w, s, data + s * source_bytes, const_cast<std::uint8_t*>(w.strip(s)));
  });
}

// Each thread reads a few strips' rows into memory that stays in its cache, and packs them from there.
void Engine::load_file(const std::string& name, int descriptor, std::int64_t offset, std::size_t bytes) {
  const Matrix& w = matrix_to_load(name, bytes);
  const std::int64_t row_bytes = stored_row_bytes(w.format, w.columns);
  const std::int64_t strips = std::max<std::int64_t>(1, kReadBytes / (kStrip * row_bytes));
  parallel_for(static_cast<int>((w.strips() + strips - 1) / strips), team_.size(), [&](int task) {
    const std::int64_t first = task * strips, last = std::min(w.strips(), first + strips);
    const std::int64_t begin = first * kStrip * row_bytes, end = std::min(w.rows, last * kStrip) * row_bytes;
    const auto buffer = std::make_unique_for_overwrite<std::uint8_t[]>(static_cast<std::size_t>(end - begin));
    for (std::int64_t done = 0; done < end - begin;) {
      const auto left = static_cast<std::size_t>(end - begin - done);
      const ssize_t got = pread(descriptor, buffer.get() + done, left, offset + begin + done);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) throw std::runtime_error("the file cannot be read to the end of " + name);
      done += got;
    }
    large_pages_.take(w.strip(first), (last - first) * w.strip_bytes());
    for (std::int64_t s = first; s < last; ++s)
      pack_strip(w, s, buffer.get() + (s - first) * kStrip * row_bytes, const_cast<std::uint8_t*>(w.strip(s)));
  });
}

void Engine::load_norm(const std::string& name, const float* data, std::size_t count) {
  if (count != static_cast<std::size_t>(shape_.dim)) throw std::invalid_argument("wrong size of " + name);
  norms_[name].assign(data, data + count);
}

void Engine::ready() {
  const auto matrix = [this](const std::string& name, std::int64_t rows, std::int64_t columns) {
    const auto found = matrices_.find(name);
    if (found == matrices_.end()) throw std::invalid_argument("missing: " + name);
    if (found->second.rows != rows || found->second.columns != columns)
      throw std::invalid_argument("wrong shape of " + name);
    return found->second;
  };
  const auto norm = [this](const std::string& name) {
    const auto found = norms_.find(name);
    if (found == norms_.end()) throw std::invalid_argument("missing: " + name);
    return found->second.data();
  };
  const auto feed_forward = [&](const std::string& prefix, const std::string& suffix) {
    const auto found = matrices_.find(prefix + "w1" + suffix);
    const std::int64_t width = found == matrices_.end() ? 0 : found->second.rows;
    return FeedForward{matrix(prefix + "w1" + suffix, width, shape_.dim),
                       matrix(prefix + "w3" + suffix, width, shape_.dim),
                       matrix(prefix + "w2" + suffix, shape_.dim, width)};
  };
  const int width = shape_.heads * shape_.head_dim, kv_width = shape_.kv_heads * shape_.head_dim;
  embedding_ = matrix("embed.weight", shape_.vocab, shape_.dim);
  head_ = matrices_.count("output.weight") ? matrix("output.weight", shape_.vocab, shape_.dim) : embedding_;
  norm_ = norm("norm.weight");
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const std::string prefix = "layers." + std::to_string(i) + ".";
    Layer& layer = layers_[i];
    layer.attention_norm = norm(prefix + "attention_norm.weight");
    layer.ffn_norm = norm(prefix + "ffn_norm.weight");
    layer.wq = matrix(prefix + "attention.wq.weight", width, shape_.dim);
    layer.wk = matrix(prefix + "attention.wk.weight", kv_width, shape_.dim);
    layer.wv = matrix(prefix + "attention.wv.weight", kv_width, shape_.dim);
    layer.wo = matrix(prefix + "attention.wo.weight", shape_.dim, width);
    if (!matrices_.count(prefix + "moe.router.weight")) {
      layer.ffn = feed_forward(prefix + "ffn.", ".weight");
      continue;
    }
    layer.router = matrix(prefix + "moe.router.weight", shape_.experts, shape_.dim);
    layer.ffn = feed_forward(prefix + "moe.shared.", ".weight");
    for (int e = 0; e < shape_.experts; ++e)
      layer.experts.push_back(feed_forward(prefix + "moe.experts.", "." + std::to_string(e)));
  }
  ready_ = true;
  large_pages_.finish();
}

int Engine::add_adapter() {
  adapters_.push_back(std::make_unique<Adapter>());
  adapters_.back()->layers.resize(layers_.size());
  return static_cast<int>(adapters_.size()) - 1;
}

void Engine::load_delta(int index, int layer, const std::string& name, int rank, const float* a, std::size_t a_count,
                        const float* b, std::size_t b_count) {
  const Which which = delta_named(name);
  if (!adapter(index) || !which || layer < 0 || layer >= static_cast<int>(layers_.size()) || rank < 1 ||
      rank > kMaxRank)
    throw std::invalid_argument("no such matrix to adapt: " + name);
  const Layer& of = layers_[static_cast<std::size_t>(layer)];
  const Matrix* matrices[] = {&of.wq, &of.wk, &of.wv, &of.wo, &of.ffn.w1, &of.ffn.w3, &of.ffn.w2};
  const Which order[] = {&AdapterLayer::wq, &AdapterLayer::wk, &AdapterLayer::wv, &AdapterLayer::wo,
                         &AdapterLayer::w1, &AdapterLayer::w3, &AdapterLayer::w2};
  const Matrix& w = *matrices[std::find(std::begin(order), std::end(order), which) - std::begin(order)];
  if (a_count != static_cast<std::size_t>(rank * w.columns) || b_count != static_cast<std::size_t>(rank * w.rows))
    throw std::invalid_argument("wrong shape of the change to " + name);
  Delta& delta = adapters_[static_cast<std::size_t>(index)]->layers[static_cast<std::size_t>(layer)].*which;
  delta.rank = rank;
  delta.a.assign(a, a + a_count);
  delta.b.assign(b, b + b_count);
}

void Engine::remove_adapter(int index) {
  if (adapter(index)) adapters_[static_cast<std::size_t>(index)].reset();
}

const Adapter* Engine::adapter(int index) const {
  if (index == -1) return nullptr;
  if (index < 0 || index >= static_cast<int>(adapters_.size()) || !adapters_[static_cast<std::size_t>(index)])
    throw std::invalid_argument("no such adapter");
  return adapters_[static_cast<std::size_t>(index)].get();
}

std::int64_t Engine::work_bytes() const { return buffers_->bytes(); }

}  // namespace herd
