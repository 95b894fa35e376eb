// Chooses the kernel set and spreads (row, key/value head) pairs over threads: each pair owns its gradients, so the
// result does not depend on the number of threads.
#include "herd/attention.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "herd/cpu.h"
#include "herd/parallel.h"

namespace herd {
namespace {

struct Choice {
  const char* name;
  const AttentionKernels* kernels;
};

Choice choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("HERD_ISA");
  bool avx2 = false, fma = false, avx512 = false;
  for (const auto& [name, present] : cpu_features()) {
    if (name == "avx2") avx2 = present;
    if (name == "fma") fma = present;
    if (name == "avx512f") avx512 = present;
  }
  const auto allowed = [wanted](const char* name) {
    return !wanted || !*wanted || std::strncmp(wanted, name, std::strlen(name)) == 0 || std::strcmp(wanted, "amx") == 0;
  };
  if (avx512 && allowed("avx512")) return {"avx512", &kAttentionAvx512};
  if (avx2 && fma && (allowed("avx2") || allowed("avx512"))) return {"avx2", &kAttentionAvx2};
#endif
  return {"scalar", &kAttentionScalar};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

void attention_forward(const AttentionShape& shape, Number number, const void* q, const void* k, const void* v, void* o,
                       float* lse_BHS, int threads) {
  const auto run = choice().kernels->forward;
  parallel_for(shape.batch * shape.kv_heads, threads,
               [&](int task) { run(shape, number, task, q, k, v, o, lse_BHS); });
}

void attention_backward(const AttentionShape& shape, Number number, const void* q, const void* k, const void* v,
                        const void* o, const void* grad_o, const float* lse_BHS, void* grad_q, void* grad_k,
                        void* grad_v, int threads) {
  const auto run = choice().kernels->backward;
  parallel_for(shape.batch * shape.kv_heads, threads, [&](int task) {
    run(shape, number, task, q, k, v, o, grad_o, lse_BHS, grad_q, grad_k, grad_v);
  });
}

const char* attention_isa() { return choice().name; }

}  // namespace herd
