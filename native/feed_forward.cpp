// The feed-forward part of a layer: one network for all rows, or several, each for the rows that were routed to it.
#include <cstring>

#include "pass.h"

namespace herd {

void Engine::Pass::feed_forward(Team::Member& m, const Layer& layer, int index) {
  const Branch dense = dense_branch(layer);
  m.each(rows_, 1, [&](std::int64_t t) {
    k_.normalise(x(t), layer.ffn_norm, shape_.norm_eps, shape_.dim, normed(t));
    put(dense.in, static_cast<int>(t), normed(t), shape_.dim);
    take_low(t, index, {&AdapterLayer::w1, &AdapterLayer::w3}, normed(t), shape_.dim);
  });
  run_branches(m, index, &dense, 1);
}

Branch Engine::Pass::dense_branch(const Layer& layer) const {
  Branch dense = branch(layer.ffn, b_.in, b_.down, rows_, x(0), true);
  dense.adapted = adapted_;
  return dense;
}

Branch Engine::Pass::branch(const FeedForward& network, PanelBuffer& in, PanelBuffer& down, int rows, float* out,
                            bool add) const {
  return {&network,
          in.reserve(rows, shape_.dim, {&network.w1, &network.w3}),
          down.reserve(rows, network.w1.rows, {&network.w2}, shape_.token_scales),
          out,
          add,
          false};
}

// hidden = silu(in·w1ᵀ)·(in·w3ᵀ), 32 columns at a time so that they can be quantised at once; out (+)= hidden·w2ᵀ.
// The networks are of one shape.
void Engine::Pass::run_branches(Team::Member& m, int layer, const Branch* branches, std::size_t n_branches) {
  const std::int64_t blocks = (branches[0].network->w1.rows + kTile - 1) / kTile;
  const std::int64_t count = static_cast<std::int64_t>(n_branches) * blocks;
  m.each(count, grain(m, count, rows_), [&](std::int64_t i) {
    const Branch& branch = branches[static_cast<std::size_t>(i / blocks)];
    const Matrix &w1 = branch.network->w1, &w3 = branch.network->w3;
    const std::int64_t b = i % blocks, strips = std::min<std::int64_t>(2, w1.strips() - 2 * b);
    const int rows = branch.rows();
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
    for (std::size_t i = 0; i < n_branches; ++i) rows += branches[i].rows();
    m.each(rows, 1, [&](std::int64_t row) {
      const Branch* branch = branches;
      for (; row >= branch->rows(); ++branch) row -= branch->rows();
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

// A whole row of hidden numbers in the form that they are multiplied in, as int8 with one scale, now that all of them
// are there.
void Engine::Pass::round_hidden(const Panels& hidden, int row) const {
  const Panel& from = hidden[Inputs::f32];
  const auto values = [&](std::int64_t b) { return reinterpret_cast<const float*>(from.block(row, b)); };
  float largest = 0;
  for (std::int64_t b = 0; b < from.blocks; ++b) largest = std::max(largest, k_.largest(values(b), kTile));
  for (const Panel& to : hidden.of)
    if (to.data && to.kind != Inputs::f32)
      for (std::int64_t b = 0; b < from.blocks; ++b) k_.put_block(to, row, b, values(b), largest);
}

}  // namespace herd
