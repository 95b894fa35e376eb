"""What a layout is: how many ways each axis splits a training step, and which splits a model and a batch allow.

Mesh order, innermost first, as in the Llama 3 paper (section 3.3.2): [TP, CP, PP, DP], so
rank = tp + TP·(cp + CP·(pp + PP·dp)). Expert parallel ranks are taken from CP and DP together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from herd.architecture import LlamaConfig
from herd.errors import UsageError
from herd.train.plan.hardware import GPUS_PER_NODE

Precision = Literal["bf16", "fp8"]
Loss = Literal["chunked", "whole"]
Schedule = Literal["1f1b", "interleaved", "gpipe", "looped-bfs"]
Recompute = Literal["none", "selective", "full"]
Sharding = Literal["optimizer", "gradients", "parameters"]
Trainer = Literal["herd", "published"]

MOST_TENSOR = 64
"""Tensor parallel ranks that are considered: beyond, every published run is far slower."""


@dataclass(frozen=True)
class Layout:
    """Ranks of each axis. `ep`: ranks that share the routed experts of a layer between them (1: each has all)."""

    tp: int
    cp: int
    pp: int
    dp: int
    ep: int = 1

    @property
    def gpus(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def axes(self) -> dict[str, int]:
        """The mesh, innermost axis first."""
        return {"tp": self.tp, "cp": self.cp, "pp": self.pp, "dp": self.dp}

    def in_node(self, *axes: str) -> int:
        """How many ranks of the group along these axes share a node."""
        strides = {"tp": 1, "cp": self.tp, "pp": self.tp * self.cp, "dp": self.tp * self.cp * self.pp}
        return math.prod(min(self.axes()[axis], max(1, GPUS_PER_NODE // strides[axis])) for axis in axes)

    def __str__(self) -> str:
        text = " ".join(f"{axis}={ranks}" for axis, ranks in self.axes().items())
        return text if self.ep == 1 else f"{text} ep={self.ep}"


@dataclass(frozen=True)
class Settings:
    """How a layout is run.

    `micro_batch`: sequences of a micro-batch · `virtual`: model chunks of a pipeline rank · `sharding`: what data
    parallel ranks hold a part of only: the optimiser's state (ZeRO-1), also gradients (ZeRO-2), also the parameters,
    gathered anew for forward and backward (ZeRO-3).
    """

    micro_batch: int = 1
    schedule: Schedule = "1f1b"
    virtual: int = 1
    recompute: Recompute = "none"
    sharding: Sharding = "optimizer"


@dataclass(frozen=True)
class Job:
    """What is to be trained: `seq` tokens a sequence, `batch_tokens` a step. Raises UsageError for a bad number.

    `loss`: "chunked" holds the logits of some rows at a time, "whole" those of the micro-batch in fp32. `trainer`:
    "herd" keeps and sends what Herd's own does (own_trainer.py), "published" what the Llama 3 paper's and torchtitan's
    do: bf16 states between layers and stages, compiled blocks, gathered weights that stay for a step.
    """

    config: LlamaConfig
    seq: int
    batch_tokens: int
    precision: Precision = "bf16"
    loss: Loss = "chunked"
    trainer: Trainer = "published"

    def __post_init__(self) -> None:
        for name, value in (("--seq", self.seq), ("--batch-tokens", self.batch_tokens)):
            if value < 1:
                raise UsageError(f"{name} is not valid", value=value, allowed="a whole number > 0")
        if self.batch_tokens % self.seq:
            below = self.batch_tokens // self.seq * self.seq
            raise UsageError(
                "--batch-tokens is no whole number of sequences",
                value=self.batch_tokens,
                allowed=f"a multiple of {self.seq:,}, such as {below or self.seq:,}",
            )

    @property
    def state_bytes(self) -> int:
        """Of a number of the states between layers and between stages."""
        return 4 if self.trainer == "herd" else 2

    @property
    def sequences(self) -> int:
        return self.batch_tokens // self.seq

    def micro_batches(self, layout: Layout, micro_batch: int) -> int:
        """Micro-batches of a step on one data parallel rank."""
        return self.sequences // (layout.dp * micro_batch)


def problems(layout: Layout, job: Job, gpus: int | None = None) -> list[str]:
    """Every reason why this layout cannot run this job, in words; none if it can."""
    config, found = job.config, []

    def need(holds: bool, text: str) -> None:
        if not holds:
            found.append(text)

    for axis, ranks in layout.axes().items():
        need(ranks >= 1, f"{axis}={ranks} is not a whole number > 0")
    if found:
        return found
    if gpus is not None:
        need(layout.gpus == gpus, f"tp·cp·pp·dp = {layout.gpus:,} is not the {gpus:,} GPUs there are")
    tp, cp, pp, dp, ep = layout.tp, layout.cp, layout.pp, layout.dp, layout.ep
    for name, size in tensor_sizes(config).items():
        need(size % tp == 0, f"tp={tp} does not divide {name} = {size:,}")
    kv = config.n_kv_heads
    need(kv % tp == 0 or tp % kv == 0, f"tp={tp} neither divides n_kv_heads = {kv} nor is a multiple of it")
    need(cp == 1 or job.seq % (2 * cp) == 0, f"cp={cp} needs a sequence of a multiple of 2·cp = {2 * cp} tokens")
    need(job.seq % (cp * tp) == 0, f"tp·cp = {tp * cp} does not divide the sequence of {job.seq:,} tokens")
    need(pp <= config.n_layers, f"pp={pp} is more than the {config.n_layers} layers")
    need(job.sequences % dp == 0, f"dp={dp} does not divide the batch of {job.sequences:,} sequences")
    whole = tp == 1 or job.trainer != "herd" or job.precision != "fp8"
    need(whole, f"tp={tp} splits matrices, and Herd's own trainer has float8 for whole ones alone")
    if config.moe is None:
        need(ep == 1, f"ep={ep}, and the model has no experts")
    else:
        experts = config.moe.n_experts
        need(ep >= 1 and experts % ep == 0, f"ep={ep} does not divide the {experts} experts")
        need(ep >= 1 and (cp * dp) % ep == 0, f"ep={ep} does not divide cp·dp = {cp * dp}")
    return found


def tensor_sizes(config: LlamaConfig) -> dict[str, int]:
    """What tensor parallel ranks split, by name."""
    sizes = {"n_heads": config.n_heads, "vocab_size": config.vocab_size}
    if config.moe is None or config.moe.interleave > 1:
        sizes["ffn_dim"] = config.ffn_dim
    if config.moe is not None:
        sizes["moe.ffn_dim"] = config.moe.ffn_dim
    return sizes


def layouts(job: Job, gpus: int) -> list[Layout]:
    """Every layout of exactly `gpus` ranks that divides everything, without expert parallel ranks."""
    numbers = divisors(gpus)
    found = []
    for tp in (n for n in numbers if n <= MOST_TENSOR and not problems(Layout(n, 1, 1, 1), job)):
        for cp in (n for n in numbers if (gpus // tp) % n == 0 and not problems(Layout(tp, n, 1, 1), job)):
            for pp in divisors(gpus // (tp * cp)):
                layout = Layout(tp, cp, pp, gpus // (tp * cp * pp))
                if not problems(layout, job):
                    found.append(layout)
    return found


def largest(job: Job, gpus: int) -> Layout:
    """A layout of as many GPUs as this job can use of so many: one of few tensor and context ranks."""
    best = Layout(1, 1, 1, 1)
    tensor = [tp for tp in range(1, MOST_TENSOR + 1) if not problems(Layout(tp, 1, 1, 1), job)]
    for tp in tensor:
        for cp in (cp for cp in divisors(job.seq) if not problems(Layout(tp, cp, 1, 1), job)):
            for dp in divisors(job.sequences):
                pp = min(job.config.n_layers, gpus // (tp * cp * dp))
                if pp * tp * cp * dp > best.gpus:
                    best = Layout(tp, cp, pp, dp)
    return best


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]


def stages(n_layers: int, pp: int, virtual: int) -> list[list[range]]:
    """The layers of every model chunk of every pipeline rank: [rank][chunk].

    Chunk c of rank r is the (c·pp + r)-th of the model. Embedding and output count as a layer each (Llama 3 paper,
    section 3.3.2: the first and the last stage have one layer less), the middle gets what does not divide. A model of
    126 layers on 16·8 chunks so has an embedding, 126 single layers and an output.
    """
    chunks = pp * virtual
    if chunks == 1:
        return [[range(n_layers)]]
    base, more = divmod(n_layers + 2, chunks)
    sizes = [base] * chunks
    for i in range(more):  # from the middle outwards
        sizes[chunks // 2 + (i // 2 if i % 2 == 0 else -1 - i // 2)] += 1
    sizes[0] -= 1
    sizes[-1] -= 1
    starts = [sum(sizes[:i]) for i in range(chunks)]
    return [
        [range(starts[c * pp + r], starts[c * pp + r] + sizes[c * pp + r]) for c in range(virtual)] for r in range(pp)
    ]
