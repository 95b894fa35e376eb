// The engine, in the Python module. Everything that comes from outside is checked here; the engine trusts it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>

#include "bindings.h"
#include "herd/engine.h"
#include "herd/probe.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace herd;

namespace {

template <class T, int Axes>
using Array = nb::ndarray<T, nb::ndim<Axes>, nb::c_contig, nb::device::cpu>;
using Bytes = Array<const std::uint8_t, 1>;
using Ints = Array<const std::int32_t, 1>;
using Floats = Array<const float, 1>;
using Table = Array<const float, 2>;
using OutRows = std::optional<Array<float, 2>>;
using OutRow = std::optional<Array<float, 1>>;

void require(bool condition, const char* what) {
  if (!condition) throw nb::value_error(what);
}

KvType kv_type(const std::string& name) {
  if (name == "f32") return KvType::f32;
  if (name == "bf16") return KvType::bf16;
  if (name == "int8") return KvType::int8;
  throw nb::value_error("no such cache type");
}

using SpecTuple = std::tuple<std::string, std::string, std::int64_t, std::int64_t>;

void make_engine(Engine* self, int dim, int heads, int kv_heads, int head_dim, int vocab, float norm_eps, bool qk_norm,
                 float temperature, int temperature_floor, int experts, int top_k, bool token_scales,
                 const std::vector<bool>& rotates, const std::vector<int>& chunks,
                 const std::vector<SpecTuple>& matrices, int threads, std::vector<int> cpus, std::int64_t patience) {
  require(rotates.size() == chunks.size(), "rotates and chunks have one value a layer");
  require(dim > 0 && heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && vocab > 0, "impossible shape");
  require(experts >= 0 && top_k >= 0 && top_k <= experts, "impossible experts");
  std::vector<Layer> layers(rotates.size());
  for (std::size_t i = 0; i < layers.size(); ++i) layers[i].rotates = rotates[i], layers[i].chunk = chunks[i];
  std::vector<Engine::Spec> specs;
  for (const auto& [name, format, rows, columns] : matrices) {
    require(rows > 0 && columns > 0, "a matrix is empty");
    specs.push_back({name, format_named(format), rows, columns});
  }
  const DecoderShape shape{
      dim,         static_cast<int>(layers.size()), heads,   kv_heads, head_dim,    vocab, norm_eps, qk_norm,
      temperature, std::max(1, temperature_floor),  experts, top_k,    token_scales};
  new (self) Engine(shape, layers, specs, threads, std::move(cpus), patience);
}

bool step(Engine& engine, Cache& cache, const Ints& tokens, const Array<const std::int64_t, 2>& spans,
          const Ints& pages, const Table& cosine, const Table& sine, const Ints& wanted, const OutRows& logits,
          const OutRows& states, const std::optional<Ints>& targets, const OutRow& log_probabilities, int vocabulary) {
  const DecoderShape& shape = engine.shape();
  const CacheShape& cached = cache.shape();
  const auto rows = static_cast<std::int64_t>(tokens.shape(0)), positions = static_cast<std::int64_t>(cosine.shape(0));
  require(engine.is_ready(), "the weights are not loaded");
  require(cached.layers == shape.layers && cached.heads == shape.kv_heads && cached.head_dim == shape.head_dim,
          "the cache is of another model");
  require(spans.shape(1) == 4, "spans are [n, 4]: rows, position, first page, adapter");
  require(cosine.shape(1) == static_cast<std::size_t>(shape.head_dim / 2) && sine.shape(0) == cosine.shape(0) &&
              sine.shape(1) == cosine.shape(1),
          "cosine and sine are [positions, head_dim / 2]");
  for (std::int64_t t = 0; t < rows; ++t)
    require(tokens.data()[t] >= 0 && tokens.data()[t] < shape.vocab, "no such token");
  Step work{tokens.data(), {}, cosine.data(), sine.data(), {}};
  std::int64_t total = 0;
  for (std::size_t s = 0; s < spans.shape(0); ++s) {
    const std::int64_t *span = spans.data() + 4 * s, count = span[0], position = span[1], first = span[2];
    require(count > 0 && count <= rows && position >= 0 && position + count <= positions, "a span is out of range");
    const std::int64_t n_pages = (position + count + cached.page_tokens - 1) / cached.page_tokens;
    require(first >= 0 && first + n_pages <= static_cast<std::int64_t>(pages.shape(0)), "a span has too few pages");
    for (std::int64_t i = 0; i < n_pages; ++i)
      require(pages.data()[first + i] >= 0 && pages.data()[first + i] < cache.pages(), "no such page");
    work.spans.push_back(
        {static_cast<int>(count), position, pages.data() + first, engine.adapter(static_cast<int>(span[3]))});
    total += count;
  }
  require(total == rows && rows > 0, "spans must cover the tokens");
  const std::size_t n_wanted = wanted.shape(0);
  work.wanted.assign(wanted.data(), wanted.data() + n_wanted);
  for (const std::int32_t row : work.wanted) require(row >= 0 && row < rows, "no such row");
  if (logits) {
    require(logits->shape(0) == n_wanted && logits->shape(1) == static_cast<std::size_t>(shape.vocab),
            "logits are [n, V]");
    work.logits = logits->data();
  }
  if (states) {
    require(states->shape(0) == n_wanted && states->shape(1) == static_cast<std::size_t>(shape.dim),
            "states are [n, D]");
    work.states = states->data();
  }
  if (log_probabilities) {
    require(targets && targets->shape(0) == n_wanted && log_probabilities->shape(0) == n_wanted, "one target a row");
    require(vocabulary > 0 && vocabulary <= shape.vocab, "vocabulary is up to the rows of the head");
    for (std::size_t i = 0; i < n_wanted; ++i)
      require(targets->data()[i] >= 0 && targets->data()[i] < vocabulary, "no such token");
    work.vocabulary = vocabulary;
    work.targets = targets->data(), work.log_probabilities = log_probabilities->data();
  }
  bool finished;
  {
    const nb::gil_scoped_release unlocked;
    finished = engine.step(work, cache, [] {
      const nb::gil_scoped_acquire locked;
      return PyErr_CheckSignals() != 0;
    });
  }
  if (!finished) throw nb::python_error();  // what the signal's handler raised
  return true;
}

// y = x·Wᵀ as the engine computes it, for tests and measurements.
void product(const std::string& format, const Bytes& data, std::int64_t rows, std::int64_t columns, const Table& x,
             const Array<float, 2>& y) {
  const EngineKernels& k = engine_kernels();
  Matrix w{format_named(format), rows, columns, nullptr};
  const auto m = static_cast<int>(x.shape(0));
  require(data.size() == static_cast<std::size_t>(rows * stored_row_bytes(w.format, columns)), "wrong number of bytes");
  require(x.shape(1) == static_cast<std::size_t>(columns) && y.shape(0) == x.shape(0) &&
              y.shape(1) == static_cast<std::size_t>(rows),
          "wrong shapes");
  const Memory packed(static_cast<std::size_t>(w.bytes() + 8192));
  for (std::int64_t s = 0; s < w.strips(); ++s)
    pack_strip(w, s, data.data() + s * kStrip * stored_row_bytes(w.format, columns),
               packed.data() + s * w.strip_bytes());
  w.data = packed.data();
  const Inputs kind = k.inputs_of(w.format);
  const Memory inputs(static_cast<std::size_t>(m * w.tiles() * block_bytes(kind)));
  const Panel panel{kind, m, w.tiles(), inputs.data()};
  for (int row = 0; row < m; ++row)
    for (std::int64_t b = 0; b < w.tiles(); ++b) {
      float values[kTile] = {};
      for (std::int64_t i = 0; i < std::min<std::int64_t>(kTile, columns - kTile * b); ++i)
        values[i] = x.data()[row * columns + kTile * b + i];
      k.put_block(panel, row, b, values, 0.0f);
    }
  for (std::int64_t s = 0; s < w.strips(); ++s) k.multiply(w, s, panel, y.data() + kStrip * s, rows, false);
}

// The values of a matrix as the engine reads them back from its packed form.
void unpacked(const std::string& format, const Bytes& data, const Array<float, 2>& out) {
  Matrix w{format_named(format), static_cast<std::int64_t>(out.shape(0)), static_cast<std::int64_t>(out.shape(1)),
           nullptr};
  require(data.size() == static_cast<std::size_t>(w.rows * stored_row_bytes(w.format, w.columns)),
          "wrong number of bytes");
  const Memory packed(static_cast<std::size_t>(w.bytes() + 8192));
  for (std::int64_t s = 0; s < w.strips(); ++s)
    pack_strip(w, s, data.data() + s * kStrip * stored_row_bytes(w.format, w.columns),
               packed.data() + s * w.strip_bytes());
  w.data = packed.data();
  for (std::int64_t r = 0; r < w.rows; ++r) engine_kernels().read_row(w, r, out.data() + r * w.columns);
}

// Keys and values [S, D] into one head of a cache, then attention of the last T tokens, as queries [T, H, D] of a group
// of heads; for tests.
void attend(Cache& cache, const Ints& pages, const Table& keys, const Table& values,
            const Array<const float, 3>& queries, std::int64_t chunk, const Array<float, 3>& out) {
  const CacheShape& shape = cache.shape();
  const auto tokens = static_cast<std::int64_t>(keys.shape(0)), rows = static_cast<std::int64_t>(queries.shape(0));
  const auto heads = static_cast<int>(queries.shape(1)), width = shape.head_dim;
  const auto has_width = [&](std::size_t n) { return n == static_cast<std::size_t>(width); };
  require(shape.layers == 1 && shape.heads == 1, "a cache of one layer and head");
  require(has_width(keys.shape(1)) && has_width(values.shape(1)) && has_width(queries.shape(2)), "wrong width");
  require(values.shape(0) == keys.shape(0) && rows <= tokens && heads > 0 && chunk >= 0, "wrong shapes");
  for (std::size_t axis = 0; axis < 3; ++axis) require(out.shape(axis) == queries.shape(axis), "wrong shape of out");
  require(static_cast<std::int64_t>(pages.shape(0)) * shape.page_tokens >= tokens, "too few pages");
  for (std::size_t i = 0; i < pages.shape(0); ++i)
    require(pages.data()[i] >= 0 && pages.data()[i] < cache.pages(), "no such page");
  const EngineKernels& k = engine_kernels();
  const CachedHead head = cache.head(0, 0, pages.data());
  for (std::int64_t t = 0; t < tokens; ++t) k.put(head, t, keys.data() + t * width, values.data() + t * width);
  const std::int64_t tile = std::max(1, kQueries / heads), stride = static_cast<std::int64_t>(heads) * width;
  std::vector<float> scratch(static_cast<std::size_t>(attention_scratch(std::max(kQueries, heads), shape.width())));
  for (std::int64_t t = 0; t < rows; t += tile)
    k.attend(head,
             {static_cast<int>(std::min(tile, rows - t)), heads, queries.data() + t * stride, stride,
              out.data() + t * stride, stride, 1.0f / std::sqrt(static_cast<float>(width)), tokens - rows + t, chunk},
             scratch.data());
}

}  // namespace

void bind_engine(nb::module_& m) {
  m.def(
      "packed_bytes",
      [](const std::string& format, std::int64_t rows, std::int64_t columns) {
        return Matrix{format_named(format), rows, columns, nullptr}.bytes();
      },
      "format"_a, "rows"_a, "columns"_a, "Memory that a matrix takes in the engine.");
  m.def("product", &product, "format"_a, "data"_a, "rows"_a, "columns"_a, "x"_a, "y"_a,
        "y [M, rows] = x [M, columns] times a matrix as it lies in a file, computed as the engine does.");
  m.def("unpacked", &unpacked, "format"_a, "data"_a, "out"_a,
        "The values of a matrix, read back from its packed form.");
  m.def("read_bandwidth", &read_bandwidth, "bytes"_a, "threads"_a, "rounds"_a, nb::call_guard<nb::gil_scoped_release>(),
        "Bytes per second read from memory.");
  m.def(
      "product_peak",
      [](int threads) {
        const ProductPeak peak = product_peak(threads);
        return std::make_tuple(peak.int8, peak.f32, peak.bf16);
      },
      "threads"_a, nb::call_guard<nb::gil_scoped_release>(),
      "Operations per second of the inner steps: int8, f32, bf16.");
  nb::class_<Cache>(m, "Cache", "Pages of keys and values.")
      .def(
          "__init__",
          [](Cache* self, const std::string& type, int layers, int heads, int head_dim, int page_tokens,
             std::int64_t pages) {
            require(layers > 0 && heads > 0 && head_dim > 0 && head_dim <= 1024 && pages > 0, "impossible shape");
            require(page_tokens > 0 && page_tokens % 16 == 0, "page_tokens must be a multiple of 16");
            new (self) Cache({kv_type(type), layers, heads, head_dim, page_tokens}, pages);
          },
          "type"_a, "layers"_a, "heads"_a, "head_dim"_a, "page_tokens"_a, "pages"_a)
      .def("copy_page", &Cache::copy_page, "source"_a, "target"_a)
      .def("attend", &attend, "pages"_a, "keys"_a, "values"_a, "queries"_a, "chunk"_a, "out"_a,
           "Stores keys and values [S, D] of the one head; out [T, H, D] = attention of the last T tokens' queries.")
      .def_prop_ro("pages", &Cache::pages)
      .def_prop_ro("page_tokens", [](const Cache& c) { return c.shape().page_tokens; })
      .def_prop_ro("page_bytes", [](const Cache& c) { return c.shape().page_bytes(); });
  nb::class_<Engine>(m, "Engine", "Packed weights of a decoder, and the step through all its layers.")
      .def("__init__", &make_engine, "dim"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "vocab"_a, "norm_eps"_a,
           "qk_norm"_a, "temperature"_a, "temperature_floor"_a, "experts"_a, "top_k"_a, "token_scales"_a, "rotates"_a,
           "chunks"_a, "matrices"_a, "threads"_a, "cpus"_a, "patience"_a = LargePages::kPatience)
      .def(
          "load",
          [](Engine& self, const std::string& name, const Bytes& data) {
            const nb::gil_scoped_release unlocked;
            self.load(name, data.data(), data.size());
          },
          "name"_a, "data"_a, "A matrix as it lies in a file, row by row.")
      .def("load_file", &Engine::load_file, "name"_a, "descriptor"_a, "offset"_a, "bytes"_a,
           nb::call_guard<nb::gil_scoped_release>(), "The same, read from an open file.")
      .def(
          "load_norm",
          [](Engine& self, const std::string& name, const Floats& data) {
            self.load_norm(name, data.data(), data.size());
          },
          "name"_a, "data"_a)
      .def("ready", &Engine::ready, "All is loaded. ValueError when something is missing.")
      .def("settle", &Engine::settle, nb::call_guard<nb::gil_scoped_release>(),
           "Returns when the weights lie in large pages, for measurements.")
      .def("before_fork", &Engine::before_fork, nb::call_guard<nb::gil_scoped_release>(),
           "Leaves the rest of the weights in the pages where they are: a child's copies of them stay shared.")
      .def("add_adapter", &Engine::add_adapter, "A new adapter's number.")
      .def("remove_adapter", &Engine::remove_adapter, "adapter"_a)
      .def(
          "load_delta",
          [](Engine& self, int adapter, int layer, const std::string& matrix, const Table& a, const Table& b) {
            require(a.shape(0) == b.shape(1), "A is [rank, columns] and B [rows, rank]");
            self.load_delta(adapter, layer, matrix, static_cast<int>(a.shape(0)), a.data(), a.size(), b.data(),
                            b.size());
          },
          "adapter"_a, "layer"_a, "matrix"_a, "a"_a, "b"_a, "The change B·A to a matrix, \"wq\" … \"w2\", of a layer.")
      .def("step", &step, "cache"_a, "tokens"_a, "spans"_a, "pages"_a, "cosine"_a, "sine"_a, "wanted"_a,
           "logits"_a = nb::none(), "states"_a = nb::none(), "targets"_a = nb::none(),
           "log_probabilities"_a = nb::none(), "vocabulary"_a = 0,
           "Appends spans [n, 4] (rows, position, index of its first page in `pages`, adapter or -1); fills the given "
           "outputs.")
      .def_prop_ro("weight_bytes", &Engine::weight_bytes)
      .def_prop_ro("work_bytes", &Engine::work_bytes)
      .def_prop_ro("threads", &Engine::threads);
}
