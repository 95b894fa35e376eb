"""How big a Llama is: parameters from shapes alone, and bytes in memory by number format."""

from __future__ import annotations

import math

from herd.architecture.config import LlamaConfig
from herd.architecture.tensors import tensor_shapes

BITS_PER_WEIGHT = {"f32": 32.0, "bf16": 16.0, "q8_0": 8.5, "q4_0": 4.5}
"""Bits per weight; block formats count their scale (32 weights share one 16-bit scale)."""


def parameter_count(config: LlamaConfig) -> int:
    """All parameters of the text model, counted from the tensor shapes."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def active_parameter_count(config: LlamaConfig) -> int:
    """Parameters that one token meets: of a mixture's experts only the chosen ones."""
    total = parameter_count(config)
    if config.moe is None:
        return total
    idle = config.moe.n_experts - config.moe.top_k
    layers = sum(config.is_moe_layer(i) for i in range(config.n_layers))
    return total - layers * idle * 3 * config.dim * config.moe.ffn_dim


def weight_bytes(config: LlamaConfig, dtype: str) -> int:
    """Bytes of the weights stored as `dtype`.

    In block formats as GGUF files have them: vectors and routers in 32 bits, and embedding and output in q8_0 where
    the rest is q4_0.
    """
    total = 0.0
    for name, shape in tensor_shapes(config).items():
        bits = BITS_PER_WEIGHT[dtype]
        if dtype.startswith("q") and (len(shape) == 1 or ".router." in name):
            bits = 32.0
        elif dtype == "q4_0" and name in ("embed.weight", "output.weight"):
            bits = BITS_PER_WEIGHT["q8_0"]
        total += math.prod(shape) * bits / 8
    return math.ceil(total)


def kv_cache_bytes(config: LlamaConfig, tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values for `tokens` positions of one sequence."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * tokens * bytes_per_value


def multiplying_parameter_count(config: LlamaConfig) -> int:
    """Active parameters that multiply: all but the embedding, which is only looked up (unless it is the output too)."""
    return active_parameter_count(config) - (0 if config.tied_embeddings else config.vocab_size * config.dim)


def training_flops_per_token(config: LlamaConfig, sequence: int, supervised: float = 1.0) -> float:
    """Floating-point operations to train on one token: 6 per active weight of a matrix, plus causal attention.

    6·N (PaLM appendix B, arXiv 2204.02311) with N without the embedding look-up, plus 6·L·H·K·S for scores and values
    over an average of S/2 visible positions, forward and backward. supervised: share of the tokens whose prediction is
    learnt; the output matrix multiplies no others.
    """
    spared = (1.0 - supervised) * config.vocab_size * config.dim
    attention = config.n_layers * config.n_heads * config.head_dim * sequence
    return 6.0 * (multiplying_parameter_count(config) - spared + attention)
