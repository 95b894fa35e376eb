// Memory of a step, kept between steps: it grows to the largest batch that was ever run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "herd/engine.h"

namespace herd {

// Uninitialised, aligned memory that only grows.
template <class T>
class Buffer {
 public:
  T* reserve(std::int64_t count) {
    if (count > count_) {
      data_.reset(), count_ = 0;  // in this order: there may be no memory for more
      data_.reset(static_cast<T*>(::operator new(static_cast<std::size_t>(count) * sizeof(T), std::align_val_t{64})));
      count_ = count;
    }
    return data_.get();
  }
  T* data() const { return data_.get(); }
  std::int64_t bytes() const { return count_ * static_cast<std::int64_t>(sizeof(T)); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
  std::int64_t count_ = 0;
};

// The same rows of inputs in each form that some product takes.
struct Panels {
  Panel of[kInputKinds] = {};
  bool used[kInputKinds] = {};

  const Panel& operator[](Inputs kind) const { return of[static_cast<int>(kind)]; }
  // The memory of `count` of the rows, as panels of their own.
  Panels part(std::int64_t first, int count) const {
    Panels rows = *this;
    for (Panel& panel : rows.of) {
      if (panel.data) panel.data += first * panel.blocks * block_bytes(panel.kind);
      panel.rows = count;
    }
    return rows;
  }
};

// Memory for panels of all forms.
class PanelBuffer {
 public:
  // For `rows` rows of `columns` inputs, multiplied with these matrices; `plain`: also in 32 bits.
  Panels reserve(int rows, std::int64_t columns, std::initializer_list<const Matrix*> matrices, bool plain = false) {
    Panels panels;
    const std::int64_t blocks = (columns + kTile - 1) / kTile;
    const auto use = [&](Inputs kind) {
      const int at = static_cast<int>(kind);
      if (panels.used[at]) return;
      panels.used[at] = true;
      panels.of[at] = {kind, rows, blocks, bytes_[at].reserve(rows * blocks * block_bytes(kind))};
    };
    for (const Matrix* matrix : matrices) use(engine_kernels().inputs_of(matrix->format));
    if (plain) use(Inputs::f32);
    return panels;
  }
  std::int64_t bytes() const {
    std::int64_t total = 0;
    for (const auto& buffer : bytes_) total += buffer.bytes();
    return total;
  }

 private:
  Buffer<std::uint8_t> bytes_[kInputKinds];
};

// A feed-forward network at work on some rows: all of them, or those that were routed to one expert.
struct Branch {
  const FeedForward* network;
  Panels in, hidden;
  float* out;  // [rows, dim]
  bool add;
  bool adapted;  // its rows are those of the batch, which may have adapters

  int rows() const {
    for (const Panel& panel : in.of)
      if (panel.data) return panel.rows;
    return 0;
  }
};

struct Engine::Buffers {
  Buffer<float> x, normed, qkv, attended, hidden, low, router, routed, states, logits;
  PanelBuffer in, out, down, head, expert_in, expert_down;
  std::vector<Buffer<float>> scratch;  // of each thread
  // Of a mixture layer: the experts of each row, with their scores, and the rows of each expert one after the other.
  std::vector<int> chosen, slot_of, row_of, order, counts, next;
  std::vector<float> score_of;
  std::vector<std::vector<Branch>> branches;  // of each layer: a member that is late may still look at them

  std::int64_t bytes() const {
    std::int64_t total = 0;
    for (const auto* b : {&in, &out, &down, &head, &expert_in, &expert_down}) total += b->bytes();
    for (const auto* b : {&x, &normed, &qkv, &attended, &hidden, &low, &router, &routed, &states, &logits})
      total += b->bytes();
    for (const auto& b : scratch) total += b.bytes();
    return total;
  }
};

}  // namespace herd
