// One step: a ragged batch through all layers. Every member of the team runs `run` from top to bottom; the loops in it
// are shared out, and a phase begins when the one before has ended everywhere.
#include <cmath>

#include "pass.h"

namespace herd {

Engine::Pass::Pass(Engine& engine, const Step& step, Cache& cache)
    : engine_(engine), shape_(engine.shape_), step_(step), cache_(cache), k_(engine_kernels()), b_(*engine.buffers_) {
  for (std::size_t s = 0; s < step.spans.size(); ++s)
    for (int i = 0; i < step.spans[s].rows; ++i) {
      span_of_.push_back(static_cast<int>(s));
      adapter_of_.push_back(step.spans[s].adapter);
      adapted_ = adapted_ || step.spans[s].adapter;
      position_of_.push_back(step.spans[s].position + i);
    }
  rows_ = static_cast<int>(span_of_.size());
  width_ = shape_.heads * shape_.head_dim, kv_width_ = shape_.kv_heads * shape_.head_dim;
  // A task of attention is a few rows of a span and one key/value head.
  const int heads = shape_.heads / shape_.kv_heads, tile = std::max(1, kQueries / heads);
  for (int s = 0, first = 0; s < static_cast<int>(step.spans.size()); first += step.spans[s++].rows)
    for (int i = 0; i < step.spans[s].rows; i += tile)
      tiles_.push_back({s, first + i, std::min(tile, step.spans[s].rows - i)});
  b_.x.reserve(static_cast<std::int64_t>(rows_) * shape_.dim);
  b_.normed.reserve(static_cast<std::int64_t>(rows_) * shape_.dim);
  b_.qkv.reserve(static_cast<std::int64_t>(rows_) * (width_ + 2 * kv_width_));
  b_.attended.reserve(static_cast<std::int64_t>(rows_) * width_);
  b_.scratch.resize(static_cast<std::size_t>(engine.threads()));
  // Memory grows here only: what the members reserve later is there already.
  for (std::size_t i = 0; i < engine.layers_.size(); ++i) {
    const Layer& layer = engine.layers_[i];
    input_of(layer);
    b_.out.reserve(rows_, width_, {&layer.wo});
    const Branch dense = dense_branch(layer);
    if (!layer.experts.empty()) reserve_mixture(layer, i, dense);
  }
  if (adapted_) {
    std::int64_t widest = 0;
    for (const Layer& layer : engine.layers_) widest = std::max(widest, layer.ffn.w1.rows);
    b_.hidden.reserve(rows_ * widest);
    b_.low.reserve(static_cast<std::int64_t>(rows_) * kDeltas * kMaxRank);
  }
  const int wanted = static_cast<int>(step.wanted.size());
  at_once_ = step.logits ? wanted : std::min(wanted, kRowsAtOnce);
  b_.states.reserve(static_cast<std::int64_t>(at_once_) * shape_.dim);
  b_.head.reserve(at_once_, shape_.dim, {&engine.head_});
  if (step.log_probabilities && !step.logits) b_.logits.reserve(static_cast<std::int64_t>(at_once_) * shape_.vocab);
  for (auto& scratch : b_.scratch)
    scratch.reserve(std::max<std::int64_t>(attention_scratch(std::max(kQueries, heads), cache.shape().width()),
                                           std::max<std::int64_t>(96L * rows_, shape_.dim + kTile)));
}

void Engine::Pass::run(Team::Member& m) {
  m.each(rows_, 1, [&](std::int64_t t) { k_.read_row(engine_.embedding_, step_.tokens[t], x(t)); });
  for (std::size_t i = 0; i < engine_.layers_.size(); ++i) {
    const Layer& layer = engine_.layers_[i];
    attention(m, layer, static_cast<int>(i));
    if (layer.experts.empty()) {
      feed_forward(m, layer, static_cast<int>(i));
    } else {
      mixture(m, layer, static_cast<int>(i));
    }
  }
  outputs(m);
}

void Engine::Pass::attention(Team::Member& m, const Layer& layer, int index) {
  const Panels in = input_of(layer), out = b_.out.reserve(rows_, width_, {&layer.wo});
  m.each(rows_, 1, [&](std::int64_t t) {
    k_.normalise(x(t), layer.attention_norm, shape_.norm_eps, shape_.dim, normed(t));
    put(in, static_cast<int>(t), normed(t), shape_.dim);
    take_low(t, index, {&AdapterLayer::wq, &AdapterLayer::wk, &AdapterLayer::wv}, normed(t), shape_.dim);
  });
  const std::int64_t stride = width_ + 2 * kv_width_;
  multiply(m,
           {product(layer.wq, in, q(0), stride, false, index, &AdapterLayer::wq),
            product(layer.wk, in, q(0) + width_, stride, false, index, &AdapterLayer::wk),
            product(layer.wv, in, q(0) + width_ + kv_width_, stride, false, index, &AdapterLayer::wv)},
           rows_);
  m.each(rows_, 1, [&](std::int64_t t) { place(layer, index, t); });
  m.each(static_cast<std::int64_t>(tiles_.size()) * shape_.kv_heads, 1, [&](std::int64_t task) {
    // The last rows see the most keys: they come first, so that no thread is left with them at the end.
    const Tile& tile = tiles_[tiles_.size() - 1 - static_cast<std::size_t>(task / shape_.kv_heads)];
    const int group = static_cast<int>(task % shape_.kv_heads), heads = shape_.heads / shape_.kv_heads;
    const Span& span = step_.spans[static_cast<std::size_t>(tile.span)];
    const int at = group * heads * shape_.head_dim;
    Queries queries{tile.rows,
                    heads,
                    q(tile.row) + at,
                    stride,
                    attended(tile.row) + at,
                    width_,
                    1.0f / std::sqrt(static_cast<float>(shape_.head_dim)),
                    position_of_[static_cast<std::size_t>(tile.row)],
                    layer.chunk};
    k_.attend(cache_.head(index, group, span.pages), queries, scratch(m));
  });
  m.each(rows_, 1, [&](std::int64_t t) {
    put(out, static_cast<int>(t), attended(t), width_);
    take_low(t, index, {&AdapterLayer::wo}, attended(t), width_);
  });
  multiply(m, {product(layer.wo, out, x(0), shape_.dim, true, index, &AdapterLayer::wo)}, rows_);
}

// Turns a row's queries and keys to its position, and stores keys and values.
void Engine::Pass::place(const Layer& layer, int index, std::int64_t t) const {
  const std::int64_t position = position_of_[static_cast<std::size_t>(t)];
  float *queries = q(t), *keys = queries + width_, *values = keys + kv_width_;
  if (layer.rotates) {
    const float* cosine = step_.cosine + position * (shape_.head_dim / 2);
    const float* sine = step_.sine + position * (shape_.head_dim / 2);
    k_.rotate(queries, shape_.heads, shape_.head_dim, cosine, sine);
    k_.rotate(keys, shape_.kv_heads, shape_.head_dim, cosine, sine);
    if (shape_.qk_norm)
      for (float* head = queries; head < values; head += shape_.head_dim)
        k_.normalise(head, nullptr, shape_.norm_eps, shape_.head_dim, head);
  } else if (shape_.temperature != 0) {
    const float steps = std::floor(static_cast<float>(position + 1) / static_cast<float>(shape_.temperature_floor));
    const float factor = std::log1p(steps) * shape_.temperature + 1.0f;
    for (int i = 0; i < width_; ++i) queries[i] *= factor;
  }
  const Span& span = step_.spans[static_cast<std::size_t>(span_of_[static_cast<std::size_t>(t)])];
  for (int g = 0; g < shape_.kv_heads; ++g)
    k_.put(cache_.head(index, g, span.pages), position, keys + g * shape_.head_dim, values + g * shape_.head_dim);
}

// Final norm and head of the wanted rows.
void Engine::Pass::outputs(Team::Member& m) {
  const int wanted = static_cast<int>(step_.wanted.size());
  const bool head = step_.logits || step_.log_probabilities;
  const std::int64_t vocab = shape_.vocab;
  for (int first = 0; first < wanted; first += at_once_) {
    const int rows = std::min(at_once_, wanted - first);
    const Panels in = b_.head.reserve(rows, shape_.dim, {&engine_.head_});
    float* logits = step_.logits ? step_.logits : b_.logits.data();
    m.each(rows, 1, [&](std::int64_t i) {
      const std::int64_t row = step_.wanted[static_cast<std::size_t>(first + i)];
      float* state = step_.states ? step_.states + (first + i) * shape_.dim : b_.states.data() + i * shape_.dim;
      k_.normalise(x(row), engine_.norm_, shape_.norm_eps, shape_.dim, state);
      if (head) put(in, static_cast<int>(i), state, shape_.dim);
    });
    if (!head) continue;
    multiply(m, {product(engine_.head_, in, logits, vocab, false)}, rows);
    if (!step_.log_probabilities) continue;
    m.each(rows, 1, [&](std::int64_t i) {
      step_.log_probabilities[first + i] =
          k_.log_probability(logits + i * vocab, step_.vocabulary, step_.targets[first + i]);
    });
  }
}

bool Engine::step(const Step& step, Cache& cache, const std::function<bool()>& interrupted) {
  Pass pass(*this, step, cache);
  return team_.run([&](Team::Member& member) { pass.run(member); }, interrupted);
}

}  // namespace herd
