"""What Herd's own trainer keeps and sends, where it differs from the published runs that the planner was fitted to.

As `herd.train.parallel` does it, with AdamW and `shard`:

- States between layers, sequence shards and stages are fp32; so are the gathered embedding and output, and one gradient
  out of two that tensor, context and expert ranks exchange.
- Blocks of tensor and context parallel ranks are not compiled: everything an operation saves is kept.
- Selective recomputation keeps every product, attention's result and what tensor parallel ranks have gathered.
- Without a pipeline weights are gathered for every micro-batch; with one, gradients are reduced once a step.
- torch's pipeline stages have a buffer for every micro-batch that they receive, forward and backward.

Parameters, AdamW's moments and gradients are fp32 in both. A test counts the bytes of two ranks and of a layer.
"""

from __future__ import annotations

import functools

from herd.architecture import LlamaConfig
from herd.train.plan.layout import Layout, Schedule, Settings, Sharding
from herd.train.plan.parts import BF16, FP32

GPU_CHUNK_LOGITS, MIN_CHUNK_ROWS = 2**28, 1024
"""As in herd.train.losses, which needs torch: logits of a chunk, and rows at least."""


@functools.lru_cache(maxsize=4096)
def kept(config: LlamaConfig, layout: Layout, mixture: bool) -> dict[str, float]:
    """Bytes per token that a layer keeps for the backward pass, by recomputation; letters as in parts.py.

    Without recomputation and compilation: of both halves the state and its normalised form, a bf16 copy of that for
    every product that reads it, q, k, v, the attention's result with its log-sum-exp and the rotation, and of every
    feed-forward network w1·x, its silu, w3·x and their product. A compiled block computes what is cheap again. What
    tensor parallel ranks have gathered is whole on each of them. Selective recomputation keeps a kernel's attention,
    and not that of context ranks, which is written in plain products.
    """
    tp = layout.tp
    d, state = config.dim, FP32 * config.dim / tp
    heads, kv = config.n_heads * config.head_dim // tp, max(config.n_kv_heads // tp, 1) * config.head_dim
    attention = BF16 * (2 * heads + 2 * kv) + FP32 * config.n_heads / tp
    top_k = config.moe.top_k if mixture and config.moe is not None else 0
    width = (config.moe.ffn_dim if mixture and config.moe is not None else config.ffn_dim) // tp
    networks = 1 + top_k
    gathered = 2 * FP32 * d if tp > 1 else 0
    found = {
        "none": 2 * state + attention + networks * 2 * BF16 * width + BF16 * top_k * d,
        "selective": state + attention + gathered + BF16 * (1 + networks) * d + networks * 2 * BF16 * width,
        "full": state,
    }
    if layout.cp > 1:
        found["selective"] -= BF16 * heads + FP32 * config.n_heads / tp
    if max(tp, layout.cp) > 1:  # not compiled (herd.train.compilation)
        rotation = 8 * config.head_dim + (FP32 * (heads + kv) if config.qk_norm else 0)
        inputs = 5 * BF16 * d + (BF16 * d + top_k * (FP32 + 3 * BF16) * d if mixture else 0)
        found["none"] = 4 * state + attention + rotation + inputs + networks * 4 * BF16 * width
    return found


def shardings(layout: Layout, every: tuple[Sharding, ...]) -> tuple[Sharding, ...]:
    """What data ranks can share: a pipeline holds whole gradients to the end of the step."""
    return every if layout.pp == 1 else ("optimizer",)


def least_micro_batches(schedule: Schedule, pp: int) -> int:
    """How many micro-batches torch's schedule needs of a rank's step."""
    return pp if schedule == "1f1b" else 1


def received(config: LlamaConfig, layout: Layout, settings: Settings, micro_batches: int) -> float:
    """Bytes per token of a micro-batch: buffers for states and gradients of every micro-batch and chunk."""
    return 0.0 if layout.pp == 1 else 2 * settings.virtual * micro_batches * FP32 * config.dim / layout.tp


def loss_bytes(config: LlamaConfig, tp: int, tokens: float) -> float:
    """A chunk's logits in bf16 with their softmax in fp32, the output matrix in bf16, and a chunk's gradient of it."""
    vocabulary = config.vocab_size // tp
    rows = min(tokens, max(MIN_CHUNK_ROWS, GPU_CHUNK_LOGITS // vocabulary))
    return rows * vocabulary * (BF16 + FP32) + 2 * BF16 * vocabulary * config.dim


def gathers(layout: Layout, sharding: Sharding, micro_batches: int) -> int:
    """How often in a step a block's weights are gathered."""
    if sharding == "parameters":
        return 2 * micro_batches
    return micro_batches if layout.pp == 1 else 1
