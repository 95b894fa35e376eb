"""What one GPU holds of a model: parameters, values kept for the backward pass, and products, layer by layer.

Letters as everywhere in Herd (D width, H query heads, G key/value heads, K head width, F feed-forward width, V
vocabulary, E experts). Where TP exceeds G, every rank holds one whole key/value head, so heads are replicated TP/G
times. Norms and routers are small and whole on every rank.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

from herd.architecture import LlamaConfig
from herd.train.plan.layout import Layout, stages

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Layer:
    """One layer as one tensor parallel rank has it.

    Parameters: `shared` on every expert parallel rank, `experts` those of this rank's experts. Per token: `products`
    multiplied weights (of experts those that a token meets), `again` those of them that selective recomputation
    multiplies twice, `kept` bytes kept for the backward pass by recomputation, `hidden` bytes of the widest part of
    the feed-forward network, `moved` bytes that operations other than products read and write in a forward pass,
    `routed` bytes that go to experts on other ranks.
    """

    shared: int
    experts: int
    products: int
    again: int
    kept: dict[str, float]
    hidden: float
    moved: float
    routed: float


@functools.lru_cache(maxsize=4096)
def layer(config: LlamaConfig, tp: int, ep: int, mixture: bool) -> Layer:
    """A layer of this model; `mixture`: one that routes tokens to experts.

    Kept without recomputation, in bf16: both norms' inputs (their outputs are cheap to have again), q, k, v and the
    attention's result with its log-sum-exp, and both halves of every feed-forward network. Selective keeps the input,
    the attention's result and the result of every second product (wq, wv, w1, w2: torchtitan's "op" mode), full
    only the input. Sequence parallel ranks split what tensor parallel ranks do not (arXiv 2205.05198).
    """
    d, heads = config.dim, config.n_heads * config.head_dim // tp
    kv = max(config.n_kv_heads // tp, 1) * config.head_dim
    attention = d * (2 * heads + 2 * kv)
    shared, experts, routed, top_k = attention + 2 * d, 0, 0.0, 0
    if mixture:
        assert config.moe is not None
        top_k = config.moe.top_k
        width = config.moe.ffn_dim // tp
        experts = config.moe.n_experts // ep * 3 * d * width
        router = d * config.moe.n_experts
        shared += 3 * d * width + router
        products = attention + router + (1 + top_k) * 3 * d * width
        routed = BF16 * top_k * d / tp
    else:
        width = config.ffn_dim // tp
        shared += 3 * d * width
        products = attention + 3 * d * width
    networks = 1 + top_k  # feed-forward networks that a token meets
    kept_attention = BF16 * (2 * heads + 2 * kv) + FP32 * config.n_heads / tp
    kept = {
        "none": 2 * BF16 * d / tp + kept_attention + networks * 2 * BF16 * width + routed,
        "selective": BF16 * (d / tp + heads + kv + heads + networks * (width + d / tp)) + routed,
        "full": BF16 * d / tp,
    }
    return Layer(
        shared=shared,
        experts=experts,
        products=products,
        again=d * kv + heads * d + networks * d * width,
        kept=kept,
        hidden=BF16 * networks * 2 * width,
        # Norms read and write D, residual sums read two and write one; RoPE and SwiGLU as products leave and take them.
        moved=BF16 * (10 * d / tp + 2 * (heads + kv) + networks * 3 * width + 4 * routed / BF16),
        routed=routed,
    )


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank has: its layers, counted by kind (mixture or not, whole attention or chunked)."""

    kinds: tuple[tuple[tuple[bool, bool], int], ...]
    embedding: int
    output: int

    @property
    def n_layers(self) -> int:
        return sum(count for _, count in self.kinds)


@functools.lru_cache(maxsize=4096)
def pipeline(config: LlamaConfig, tp: int, pp: int, virtual: int) -> tuple[Stage, ...]:
    """The stages of all pipeline ranks. `embedding` and `output` count parameters; tied ones on one rank count once."""
    table = config.vocab_size * config.dim // tp
    split = stages(config.n_layers, pp, virtual)
    found = []
    for rank, chunks in enumerate(split):
        kinds = Counter(
            (config.is_moe_layer(i), config.attention_chunk is None or not config.uses_rope(i))
            for chunk in chunks
            for i in chunk
        )
        first, last = rank == 0, rank == pp - 1
        output = 0 if not last else config.dim + (0 if config.tied_embeddings and first else table)
        found.append(Stage(tuple(sorted(kinds.items())), table if first else 0, output))
    return tuple(found)


def stage_parameters(config: LlamaConfig, layout: Layout, stage: Stage) -> tuple[int, int]:
    """Parameters of one GPU of a stage: (those on every expert parallel rank, those of its experts)."""
    shared, experts = stage.embedding + stage.output, 0
    for (mixture, _), count in stage.kinds:
        part = layer(config, layout.tp, layout.ep, mixture)
        shared += count * part.shared
        experts += count * part.experts
    return shared, experts


def visible(config: LlamaConfig, seq: int, whole: bool) -> float:
    """Keys that a token sees, on average over a sequence: causal, and within a chunk where attention is chunked."""
    chunk = config.attention_chunk
    return seq / 2 if whole or chunk is None else min(seq, chunk) / 2
