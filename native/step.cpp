// One step: a ragged batch through all layers. Every member of the team runs `run` from top to bottom; the loops in it
// are shared out, and a phase begins when the one before has ended everywhere.
//
// Letters: T rows of the batch, D model width, H query heads, G key/value heads, K head width, F inner width.
#include "step.h"

#include <cmath>
#include <cstring>
#include <numeric>

namespace herd {

class Engine::Pass {
 public:
  Pass(Engine& engine, const Step& step, Cache& cache)
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
    b_.x.reserve(rows_ * shape_.dim);
    b_.normed.reserve(rows_ * shape_.dim);
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

  void run(Team::Member& m) {
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

 private:
  struct Tile {
    int span, row, rows;
  };
  // Where only one probability of each wanted row is asked for, logits exist for so many rows at a time.
  static constexpr int kRowsAtOnce = 64;
  static constexpr int kDeltas = 3;  // changes to matrices that are multiplied with the same inputs

  float* x(std::int64_t row) const { return b_.x.data() + row * shape_.dim; }
  float* normed(std::int64_t row) const { return b_.normed.data() + row * shape_.dim; }
  float* q(std::int64_t row) const { return b_.qkv.data() + row * (width_ + 2 * kv_width_); }
  float* attended(std::int64_t row) const { return b_.attended.data() + row * width_; }
  float* scratch(const Team::Member& m) const { return b_.scratch[static_cast<std::size_t>(m.index())].data(); }

  // Neighbouring strips for a thread at a time: for one row a strip is little work, for many it is enough.
  std::int64_t grain(const Team::Member& m, std::int64_t strips, int rows) const {
    return rows >= 16 ? 1 : std::max<std::int64_t>(1, strips / (8 * m.size()));
  }

  // Puts n inputs into a row of all forms in use.
  void put(const Panels& panels, int row, const float* values, std::int64_t n) const {
    const std::int64_t whole = n / kTile;
    const float largest = shape_.token_scales ? k_.largest(values, n) : 0.0f;
    for (int kind = 0; kind < 2; ++kind) {
      if (!panels.used[kind]) continue;
      for (std::int64_t b = 0; b < whole; ++b) k_.put_block(panels.of[kind], row, b, values + kTile * b, largest);
      if (n % kTile) {
        float rest[kTile] = {};
        std::memcpy(rest, values + kTile * whole, sizeof(float) * static_cast<std::size_t>(n % kTile));
        k_.put_block(panels.of[kind], row, whole, rest, largest);
      }
    }
  }

  // y (+)= x·Wᵀ for several matrices side by side, with the rows' own changes to them, if `which` has any.
  struct Product {
    const Matrix* w;
    const Panel* x;
    float* y;
    std::int64_t stride;
    bool add;
    int layer = 0;
    Which which = nullptr;
  };
  template <std::size_t N>
  void multiply(Team::Member& m, const Product (&products)[N], int rows) const {
    std::int64_t strips = 0;
    for (const Product& p : products) strips += p.w->strips();
    m.each(strips, grain(m, strips, rows), [&](std::int64_t i) {
      const Product* p = products;
      for (; i >= p->w->strips(); ++p) i -= p->w->strips();
      k_.multiply(*p->w, i, *p->x, p->y + kStrip * i, p->stride, p->add);
      if (adapted_ && p->which)
        add_change(p->layer, p->which, static_cast<int>(p - products), *p->w, i, p->y + kStrip * i, p->stride);
    });
  }
  Product product(const Matrix& w, const Panels& in, float* y, std::int64_t stride, bool add, int layer = 0,
                  Which which = nullptr) const {
    return {&w, &in[k_.inputs_of(w.format)], y, stride, add, layer, which};
  }

  // Adapters, in two parts. The inputs' low-rank image A·x of a row, one for each of up to kDeltas matrices …
  float* low(std::int64_t row, int at) const { return b_.low.data() + (row * kDeltas + at) * kMaxRank; }
  const Delta* delta(std::int64_t row, int layer, Which which) const {
    const Adapter* adapter = adapter_of_[static_cast<std::size_t>(row)];
    const Delta* found = adapter ? &(adapter->layers[static_cast<std::size_t>(layer)].*which) : nullptr;
    return found && found->rank ? found : nullptr;
  }
  void take_low(std::int64_t row, int layer, std::initializer_list<Which> matrices, const float* x,
                std::int64_t n) const {
    int at = 0;
    for (const Which which : matrices) {
      if (const Delta* d = delta(row, layer, which)) {
        std::fill(low(row, at), low(row, at) + d->rank, 0.0f);
        k_.add_dots(d->a.data(), d->rank, n, x, low(row, at));
      }
      ++at;
    }
  }
  // … and B times it, added to the outputs of one strip.
  void add_change(int layer, Which which, int at, const Matrix& w, std::int64_t strip, float* y,
                  std::int64_t stride) const {
    const std::int64_t width = std::min<std::int64_t>(kStrip, w.rows - kStrip * strip);
    for (int row = 0; row < rows_; ++row)
      if (const Delta* d = delta(row, layer, which))
        k_.add_dots(d->b.data() + kStrip * strip * d->rank, width, d->rank, low(row, at), y + row * stride);
  }

  void attention(Team::Member& m, const Layer& layer, int index) {
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
  void place(const Layer& layer, int index, std::int64_t t) const {
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
    const bool last = position == span.position + span.rows - 1;
    for (int g = 0; g < shape_.kv_heads; ++g)
      k_.put(cache_.head(index, g, span.pages), position, keys + g * shape_.head_dim, values + g * shape_.head_dim,
             last);
  }

  Panels input_of(const Layer& layer) const {
    return b_.in.reserve(rows_, shape_.dim, {&layer.wq, &layer.wk, &layer.wv});
  }
  Branch dense_branch(const Layer& layer) const {
    Branch dense = branch(layer.ffn, b_.in, b_.down, rows_, x(0), true);
    dense.adapted = adapted_;
    return dense;
  }

  void feed_forward(Team::Member& m, const Layer& layer, int index) {
    const Branch dense = dense_branch(layer);
    m.each(rows_, 1, [&](std::int64_t t) {
      k_.normalise(x(t), layer.ffn_norm, shape_.norm_eps, shape_.dim, normed(t));
      put(dense.in, static_cast<int>(t), normed(t), shape_.dim);
      take_low(t, index, {&AdapterLayer::w1, &AdapterLayer::w3}, normed(t), shape_.dim);
    });
    run_branches(m, index, &dense, 1);
  }

  Branch branch(const FeedForward& network, PanelBuffer& in, PanelBuffer& down, int rows, float* out, bool add) const {
    return {&network,
            in.reserve(rows, shape_.dim, {&network.w1, &network.w3}),
            down.reserve(rows, network.w1.rows, {&network.w2}, shape_.token_scales),
            out,
            add,
            false};
  }

  static int rows_of(const Branch& branch) {
    for (int kind = 0; kind < 2; ++kind)
      if (branch.in.used[kind]) return branch.in.of[kind].rows;
    return 0;
  }

  // hidden = silu(in·w1ᵀ)·(in·w3ᵀ), 32 columns at a time so that they can be quantised at once; out (+)= hidden·w2ᵀ.
  // The networks are of one shape.
  void run_branches(Team::Member& m, int layer, const Branch* branches, std::size_t n_branches) {
    const std::int64_t blocks = (branches[0].network->w1.rows + kTile - 1) / kTile;
    const std::int64_t count = static_cast<std::int64_t>(n_branches) * blocks;
    m.each(count, grain(m, count, rows_), [&](std::int64_t i) {
      const Branch& branch = branches[static_cast<std::size_t>(i / blocks)];
      const Matrix &w1 = branch.network->w1, &w3 = branch.network->w3;
      const std::int64_t b = i % blocks, strips = std::min<std::int64_t>(2, w1.strips() - 2 * b);
      const int rows = rows_of(branch);
      float *gate = scratch(m), *up = gate + kTile * rows, *hidden = up + kTile * rows;
      if (strips < 2 || w1.rows % kTile) std::fill(gate, hidden, 0.0f);
      for (std::int64_t s = 0; s < strips; ++s) {
        k_.multiply(w1, 2 * b + s, branch.in[k_.inputs_of(w1.format)], gate + kStrip * s, kTile, false);
        k_.multiply(w3, 2 * b + s, branch.in[k_.inputs_of(w3.format)], up + kStrip * s, kTile, false);
        if (branch.adapted) {
          add_change(layer, &AdapterLayer::w1, 0, w1, 2 * b + s, gate + kStrip * s, kTile);
          add_change(layer, &AdapterLayer::w3, 1, w3, 2 * b + s, up + kStrip * s, kTile);
        }
      }
      k_.swiglu(gate, up, kTile * rows, hidden);
      const Inputs kind = shape_.token_scales ? Inputs::f32 : k_.inputs_of(branch.network->w2.format);
      for (int t = 0; t < rows; ++t) k_.put_block(branch.hidden[kind], t, b, hidden + kTile * t, 0.0f);
      if (branch.adapted) {
        const auto count = static_cast<std::size_t>(std::min<std::int64_t>(kTile, w1.rows - kTile * b));
        for (int t = 0; t < rows; ++t)
          std::memcpy(b_.hidden.data() + t * w1.rows + kTile * b, hidden + kTile * t, sizeof(float) * count);
      }
    });
    if (shape_.token_scales) {
      std::int64_t rows = 0;
      for (std::size_t i = 0; i < n_branches; ++i) rows += rows_of(branches[i]);
      m.each(rows, 1, [&](std::int64_t row) {
        const Branch* branch = branches;
        for (; row >= rows_of(*branch); ++branch) row -= rows_of(*branch);
        round_hidden(branch->hidden, static_cast<int>(row));
      });
    }
    if (branches[0].adapted) {
      const std::int64_t n = branches[0].network->w1.rows;
      m.each(rows_, 1, [&](std::int64_t t) { take_low(t, layer, {&AdapterLayer::w2}, b_.hidden.data() + t * n, n); });
    }
    const std::int64_t strips = branches[0].network->w2.strips();
    const std::int64_t all = static_cast<std::int64_t>(n_branches) * strips;
    m.each(all, grain(m, all, rows_), [&](std::int64_t i) {
      const Branch& branch = branches[static_cast<std::size_t>(i / strips)];
      const Matrix& w2 = branch.network->w2;
      const std::int64_t s = i % strips;
      k_.multiply(w2, s, branch.hidden[k_.inputs_of(w2.format)], branch.out + kStrip * s, shape_.dim, branch.add);
      if (branch.adapted) add_change(layer, &AdapterLayer::w2, 0, w2, s, branch.out + kStrip * s, shape_.dim);
    });
  }

  // A whole row of hidden numbers as int8 with one scale, now that all of them are there.
  void round_hidden(const Panels& hidden, int row) const {
    const Panel &from = hidden[Inputs::f32], &to = hidden[Inputs::int8];
    if (!hidden.used[static_cast<int>(Inputs::int8)]) return;
    const auto values = [&](std::int64_t b) { return reinterpret_cast<const float*>(from.block(row, b)); };
    float largest = 0;
    for (std::int64_t b = 0; b < from.blocks; ++b) largest = std::max(largest, k_.largest(values(b), kTile));
    for (std::int64_t b = 0; b < from.blocks; ++b) k_.put_block(to, row, b, values(b), largest);
  }

  // shared(h) + Σ over a row's experts e of expert_e(sigmoid(router_e(h))·h), for the normalised input h.
  void mixture(Team::Member& m, const Layer& layer, int index) {
    const int top_k = shape_.top_k, slots = rows_ * top_k;
    const Panels in = b_.head.reserve(rows_, shape_.dim, {&layer.router});
    const Branch shared = dense_branch(layer);
    m.each(rows_, 1, [&](std::int64_t t) {
      k_.normalise(x(t), layer.ffn_norm, shape_.norm_eps, shape_.dim, normed(t));
      put(in, static_cast<int>(t), normed(t), shape_.dim);
      put(shared.in, static_cast<int>(t), normed(t), shape_.dim);
      take_low(t, index, {&AdapterLayer::w1, &AdapterLayer::w3}, normed(t), shape_.dim);
    });
    multiply(m, {product(layer.router, in, b_.router.data(), shape_.experts, false)}, rows_);
    std::vector<Branch>& branches = b_.branches[static_cast<std::size_t>(index)];
    m.each(1, 1, [&](std::int64_t) { route(layer, shared, branches); });
    m.each(slots, 1, [&](std::int64_t slot) {
      const auto s = static_cast<std::size_t>(slot);
      float* scaled = scratch(m);
      const float* h = normed(b_.row_of[s]);
      for (int i = 0; i < shape_.dim; ++i) scaled[i] = h[i] * b_.score_of[s];
      std::size_t e = 1;  // the branch that holds this slot
      std::int64_t first = 0;
      while (slot >= first + rows_of(branches[e])) first += rows_of(branches[e++]);
      put(branches[e].in, static_cast<int>(slot - first), scaled, shape_.dim);
    });
    run_branches(m, index, branches.data(), branches.size());
    m.each(rows_, 1, [&](std::int64_t t) {
      for (int j = 0; j < top_k; ++j) {
        const float* y = b_.routed.data() +
                         static_cast<std::int64_t>(b_.slot_of[static_cast<std::size_t>(t * top_k + j)]) * shape_.dim;
        for (int i = 0; i < shape_.dim; ++i) x(t)[i] += y[i];
      }
    });
  }

  // Memory for the rows of all experts, one expert's after the other's. There is a branch from the beginning, because
  // an interrupted step goes on without its routes.
  void reserve_mixture(const Layer& layer, std::size_t index, const Branch& shared) {
    const std::int64_t slots = static_cast<std::int64_t>(rows_) * shape_.top_k;
    const auto experts = static_cast<std::size_t>(shape_.experts);
    b_.head.reserve(rows_, shape_.dim, {&layer.router});
    b_.router.reserve(static_cast<std::int64_t>(rows_) * shape_.experts);
    for (auto* ints : {&b_.chosen, &b_.slot_of, &b_.row_of}) ints->resize(static_cast<std::size_t>(slots));
    b_.score_of.resize(static_cast<std::size_t>(slots));
    b_.order.resize(experts), b_.counts.resize(experts), b_.next.resize(experts);
    branch(layer.experts[0], b_.expert_in, b_.expert_down, static_cast<int>(slots),
           b_.routed.reserve(slots * shape_.dim), false);
    b_.branches.resize(engine_.layers_.size());
    b_.branches[index].reserve(experts + 1);
    b_.branches[index].assign(1, shared);
  }

  // The top_k experts of each row, and a branch for each expert that has rows.
  void route(const Layer& layer, const Branch& shared, std::vector<Branch>& branches) const {
    const int experts = shape_.experts, top_k = shape_.top_k;
    std::vector<int>&order = b_.order, &counts = b_.counts, &next = b_.next;
    std::fill(counts.begin(), counts.end(), 0);
    for (int t = 0; t < rows_; ++t) {
      const float* logits = b_.router.data() + static_cast<std::int64_t>(t) * experts;
      std::iota(order.begin(), order.end(), 0);
      // Not-a-number ranks last, so that the order is one.
      const auto rank = [logits](int e) { return logits[e] == logits[e] ? logits[e] : -INFINITY; };
      std::partial_sort(order.begin(), order.begin() + top_k, order.end(),
                        [&](int a, int c) { return rank(a) != rank(c) ? rank(a) > rank(c) : a < c; });
      for (int j = 0; j < top_k; ++j) {
        b_.chosen[static_cast<std::size_t>(t * top_k + j)] = order[static_cast<std::size_t>(j)];
        ++counts[static_cast<std::size_t>(order[static_cast<std::size_t>(j)])];
      }
    }
    const Branch all = branch(layer.experts[0], b_.expert_in, b_.expert_down, rows_ * top_k, b_.routed.data(), false);
    branches.assign(1, shared);
    int slot = 0;
    for (std::size_t e = 0; e < counts.size(); ++e) {
      next[e] = slot;
      if (!counts[e]) continue;
      branches.push_back({&layer.experts[e], all.in.part(slot, counts[e]), all.hidden.part(slot, counts[e]),
                          all.out + static_cast<std::int64_t>(slot) * shape_.dim, false, false});
      slot += counts[e];
    }
    for (int i = 0; i < rows_ * top_k; ++i) {
      const int e = b_.chosen[static_cast<std::size_t>(i)], t = i / top_k;
      const auto s = static_cast<std::size_t>(next[static_cast<std::size_t>(e)]++);
      const float logit = b_.router.data()[static_cast<std::int64_t>(t) * experts + e];
      b_.slot_of[static_cast<std::size_t>(i)] = static_cast<int>(s);
      b_.row_of[s] = t, b_.score_of[s] = 1.0f / (1.0f + std::exp(-logit));
    }
  }

  // Final norm and head of the wanted rows.
  void outputs(Team::Member& m) {
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

  Engine& engine_;
  const DecoderShape& shape_;
  const Step& step_;
  Cache& cache_;
  const EngineKernels& k_;
  Engine::Buffers& b_;
  int rows_ = 0, width_ = 0, kv_width_ = 0, at_once_ = 0;
  bool adapted_ = false;  // some row has an adapter
  std::vector<int> span_of_;
  std::vector<const Adapter*> adapter_of_;
  std::vector<std::int64_t> position_of_;
  std::vector<Tile> tiles_;
};

bool Engine::step(const Step& step, Cache& cache, const std::function<bool()>& interrupted) {
  Pass pass(*this, step, cache);
  return team_.run([&](Team::Member& member) { pass.run(member); }, interrupted);
}

}  // namespace herd
