// Low-rank changes to a model's matrices, W + B·A, applied to some rows of a batch while others have other ones or none
// (LoRA, arXiv 2106.09685).
#pragma once

#include <string>
#include <vector>

namespace herd {

constexpr int kMaxRank = 1024;

struct Delta {
  std::vector<float> a, b;  // [rank, columns], [rows, rank]; the factor alpha / rank is in b
  int rank = 0;
};

// The matrices of a layer that can have a change; those of the feed-forward network, or of the shared one in a mixture.
struct AdapterLayer {
  Delta wq, wk, wv, wo, w1, w3, w2;
};

using Which = Delta AdapterLayer::*;

// By the last part of a matrix's name, "wq" … "w2"; null for another.
inline Which delta_named(const std::string& name) {
  if (name == "wq") return &AdapterLayer::wq;
  if (name == "wk") return &AdapterLayer::wk;
  if (name == "wv") return &AdapterLayer::wv;
  if (name == "wo") return &AdapterLayer::wo;
  if (name == "w1") return &AdapterLayer::w1;
  if (name == "w3") return &AdapterLayer::w3;
  if (name == "w2") return &AdapterLayer::w2;
  return nullptr;
}

struct Adapter {
  std::vector<AdapterLayer> layers;
};

}  // namespace herd
