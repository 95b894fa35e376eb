// A mixture of experts (Llama 4): which rows go to which expert, and what becomes of them.
#include <cmath>
#include <numeric>

#include "pass.h"

namespace herd {

// shared(h) + Σ over a row's experts e of expert_e(sigmoid(router_e(h))·h), for the normalised input h.
void Engine::Pass::mixture(Team::Member& m, const Layer& layer, int index) {
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
    while (slot >= first + branches[e].rows()) first += branches[e++].rows();
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
void Engine::Pass::reserve_mixture(const Layer& layer, std::size_t index, const Branch& shared) {
  const std::int64_t slots = static_cast<std::int64_t>(rows_) * shape_.top_k;
  const auto experts = static_cast<std::size_t>(shape_.experts);
  b_.head.reserve(rows_, shape_.dim, {&layer.router});
  b_.router.reserve(static_cast<std::int64_t>(rows_) * shape_.experts);
  for (auto* ints : {&b_.chosen, &b_.slot_of, &b_.row_of}) ints->resize(static_cast<std::size_t>(slots));
  b_.score_of.resize(static_cast<std::size_t>(slots));
  b_.order.resize(experts), b_.counts.resize(experts), b_.next.resize(experts);
  branch(layer.experts[0], b_.expert_in, b_.expert_down, static_cast<int>(slots), b_.routed.reserve(slots * shape_.dim),
         false);
  b_.branches.resize(engine_.layers_.size());
  b_.branches[index].reserve(experts + 1);
  b_.branches[index].assign(1, shared);
}

// The top_k experts of each row, and a branch for each expert that has rows.
void Engine::Pass::route(const Layer& layer, const Branch& shared, std::vector<Branch>& branches) const {
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

}  // namespace herd
