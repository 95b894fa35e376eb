// Chooses the kernel set and spreads (row, key/value head) pairs over threads: each pair owns its gradients, so the
// result does not depend on the number of threads.
#include "herd/attention.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "herd/cpu.h"
#include "herd/parallel.h"

namespace herd {
namespace {

struct KernelSet {
  const char* name;
  const AttentionKernels* kernels;
};

// The sets that this processor has, narrowest first, up to the one that HERD_ISA names.
std::vector<KernelSet> available_sets() {
  std::vector<KernelSet> sets{{"scalar", &kAttentionScalar}};
#if defined(__x86_64__)
  std::map<std::string, bool> has;
  for (const auto& [name, present] : cpu_features()) has[name] = present;
  if (has["avx2"] && has["fma"]) sets.push_back({"avx2", &kAttentionAvx2});
  if (has["avx512f"] && has["avx512bw"] && has["avx512vl"]) {
    sets.push_back({"avx512", &kAttentionAvx512});
    if (has["avx512_bf16"]) sets.push_back({"avx512_bf16", &kAttentionAvx512Bf16});
  }
  if (const char* limit = std::getenv("HERD_ISA")) {
    const auto named = std::find_if(sets.begin(), sets.end(),
                                    [limit](const KernelSet& set) { return set.name == std::string(limit); });
    if (named != sets.end()) sets.erase(named + 1, sets.end());
  }
#endif
  return sets;
}

// The widest set; the one with bfloat16 products is for bfloat16 inputs only.
const KernelSet& chosen(Number number) {
  static const std::vector<KernelSet> sets = available_sets();
  const bool skip = number == Number::f32 && sets.back().kernels == &kAttentionAvx512Bf16;
  return sets[sets.size() - (skip ? 2 : 1)];
}

}  // namespace

void attention_forward(const AttentionShape& shape, Number number, const void* q, const void* k, const void* v, void* o,
                       float* lse_BHS, int threads) {
  const auto run = chosen(number).kernels->forward;
  parallel_for(shape.batch * shape.kv_heads, threads,
               [&](int task) { run(shape, number, task, q, k, v, o, lse_BHS); });
}

void attention_backward(const AttentionShape& shape, Number number, const void* q, const void* k, const void* v,
                        const void* o, const void* grad_o, const float* lse_BHS, void* grad_q, void* grad_k,
                        void* grad_v, int threads) {
  const auto run = chosen(number).kernels->backward;
  parallel_for(shape.batch * shape.kv_heads, threads, [&](int task) {
    run(shape, number, task, q, k, v, o, grad_o, lse_BHS, grad_q, grad_k, grad_v);
  });
}

const char* attention_isa(Number number) { return chosen(number).name; }

}  // namespace herd
