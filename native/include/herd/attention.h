// Exact causal attention for training on a CPU, forward and backward, in tiles that stay in cache.
//
// Letters: B batch, S positions, H query heads, G key/value heads, K head width (a multiple of 16, at most 256).
// Query s of row b sees keys first[b, s] … s, which expresses documents, chunks and sliding windows alike.
// Inputs and outputs are 32-bit or bfloat16. Arithmetic is 32-bit; for bfloat16 inputs, where the processor multiplies
// them, products take bfloat16 factors (probabilities are rounded, as GPUs do) and sum in 32 bits. Only log-sum-exp is
// kept for the backward pass, which computes the probabilities again (FlashAttention-2, arXiv 2307.08691).
#pragma once

#include <cstdint>

namespace herd {

struct AttentionShape {
  int batch, positions, heads, kv_heads, head_dim;
  float scale;  // of scores, above 0
  const std::int32_t* first_BS;
};

enum class Number { f32, bf16 };

// q_BSHK, k_BSGK, v_BSGK → o_BSHK and lse_BHS (natural logarithm of the sum of exponentials of scaled scores).
void attention_forward(const AttentionShape& shape, Number number, const void* q, const void* k, const void* v, void* o,
                       float* lse_BHS, int threads);

// Gradients of the inputs, in the inputs' number format, from the gradient do_BSHK of the output.
void attention_backward(const AttentionShape& shape, Number number, const void* q, const void* k, const void* v,
                        const void* o, const void* grad_o, const float* lse_BHS, void* grad_q, void* grad_k,
                        void* grad_v, int threads);

// One kernel set per instruction set; the widest that this process may execute is chosen once (HERD_ISA overrides).
struct AttentionKernels {
  void (*forward)(const AttentionShape&, Number, int task, const void* q, const void* k, const void* v, void* o,
                  float* lse_BHS);
  void (*backward)(const AttentionShape&, Number, int task, const void* q, const void* k, const void* v, const void* o,
                   const void* grad_o, const float* lse_BHS, void* grad_q, void* grad_k, void* grad_v);
};
extern const AttentionKernels kAttentionScalar, kAttentionAvx2, kAttentionAvx512, kAttentionAvx512Bf16;

// Name of the kernel set in use for such inputs: "scalar", "avx2", "avx512" or "avx512_bf16".
const char* attention_isa(Number number);

}  // namespace herd
