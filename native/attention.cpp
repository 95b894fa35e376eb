// Chooses the kernel set and spreads (row, key/value head) pairs over threads: each pair owns its gradients, so the
// result does not depend on the number of threads.
#include "herd/attention.h"

#include "herd/isa.h"
#include "herd/parallel.h"

namespace herd {
namespace {

struct KernelSet {
  const char* name;
  const AttentionKernels* kernels;
};

// The set with bfloat16 products is for bfloat16 inputs only.
KernelSet chosen(Number number) {
#if defined(__x86_64__)
  const Isa isa = widest_isa();
  if (isa >= Isa::avx512_bf16 && number == Number::bf16) return {"avx512_bf16", &kAttentionAvx512Bf16};
  if (isa >= Isa::avx512) return {"avx512", &kAttentionAvx512};
  if (isa >= Isa::avx2) return {"avx2", &kAttentionAvx2};
#endif
  return {"scalar", &kAttentionScalar};
}

}  // namespace

void attention_forward(const AttentionShape& shape, Number number, const void* q, const void* k, const void* v, void* o,
                       float* lse_BHS, int threads) {
  const auto run = chosen(number).kernels->forward;
  parallel_for(shape.batch * shape.kv_heads, threads, [&](int task) { run(shape, number, task, q, k, v, o, lse_BHS); });
}

void attention_backward(const AttentionShape& shape, Number number, const void* q, const void* k, const void* v,
                        const void* o, const void* grad_o, const float* lse_BHS, void* grad_q, void* grad_k,
                        void* grad_v, int threads) {
  const auto run = chosen(number).kernels->backward;
  parallel_for(shape.batch * shape.kv_heads, threads,
               [&](int task) { run(shape, number, task, q, k, v, o, grad_o, lse_BHS, grad_q, grad_k, grad_v); });
}

const char* attention_isa(Number number) { return chosen(number).name; }

}  // namespace herd
