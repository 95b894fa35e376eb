// A step at work: its batch, where each row stands, and what every part of a layer needs to run.
//
// Letters: T rows of the batch, D model width, H query heads, G key/value heads, K head width, F inner width.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "step.h"

namespace herd {

class Engine::Pass {
 public:
  Pass(Engine& engine, const Step& step, Cache& cache);
  void run(Team::Member& m);

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
    for (int kind = 0; kind < kInputKinds; ++kind) {
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

  // step.cpp
  void attention(Team::Member& m, const Layer& layer, int index);
  void place(const Layer& layer, int index, std::int64_t t) const;
  void outputs(Team::Member& m);
  Panels input_of(const Layer& layer) const {
    return b_.in.reserve(rows_, shape_.dim, {&layer.wq, &layer.wk, &layer.wv});
  }

  // feed_forward.cpp
  void feed_forward(Team::Member& m, const Layer& layer, int index);
  Branch branch(const FeedForward& network, PanelBuffer& in, PanelBuffer& down, int rows, float* out, bool add) const;
  Branch dense_branch(const Layer& layer) const;
  void run_branches(Team::Member& m, int layer, const Branch* branches, std::size_t n_branches);
  void round_hidden(const Panels& hidden, int row) const;

  // mixture.cpp
  void reserve_mixture(const Layer& layer, std::size_t index, const Branch& shared);
  void mixture(Team::Member& m, const Layer& layer, int index);
  void route(const Layer& layer, const Branch& shared, std::vector<Branch>& branches) const;

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

}  // namespace herd
