"""GPUs and networks as the planner sees them: the published limits, and what training really reaches of them.

Five numbers are fitted, each to one published run (a test fits them again). The other runs of docs/plan.md were not
fitted, but were in view while the model got its form.

- "h100" (700 W), `matmul` and `attention`: Llama 3 paper, Table 4, 405B: row 1 (8,192 GPUs, 430 TFLOP/s each) and row 3
  (sequences of 131,072 tokens, 380 TFLOP/s).
- "h100-500w", `matmul`, `float8` and `attention`: torchtitan 2024-12, 8B on 8 GPUs, FSDP and compile: bf16 (6,667
  tokens/s per GPU), float8 (8,532), float8 at 32,768 tokens (3,890).
"""

from __future__ import annotations

from dataclasses import dataclass

from herd.errors import UsageError, near

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of eight. Rates in FLOP/s and bytes/s.

    `peak`: dense bf16 as published, what MFU is a share of · `matmul`, `attention`: what matrix products and flash
    attention reach of it · `float8`: how much faster a matrix product is in float8 (1: not at all) · `memory_rate`:
    of its memory · `nvlink`, `network`: to its node and out of it, one way, as published · `memory`: its bytes.
    """

    name: str
    peak: float
    matmul: float
    attention: float
    float8: float
    memory_rate: float
    nvlink: float
    network: float
    memory: int

    def link(self, size: int, near: int) -> Link:
        """What a group of `size` ranks, `near` of them in a node, has for a collective.

        Within a node NVLink. Across nodes every GPU has its own network port; members of one node use theirs together,
        so each sees as many ports as the group has members in a node, at most NVLink.
        """
        if near >= size:
            return Link(self.nvlink * ACHIEVED, LATENCY_NODE)
        return Link(min(self.nvlink, self.network * near) * ACHIEVED, LATENCY_NETWORK)


@dataclass(frozen=True)
class Link:
    """What one rank sees of a group's network: bytes/s one way, and seconds before the first byte."""

    rate: float
    latency: float

    def seconds(self, n_bytes: float, collectives: float = 1.0) -> float:
        """Time of `collectives` collectives that bring `n_bytes` to every rank altogether."""
        return n_bytes / self.rate + collectives * self.latency


ACHIEVED = 0.8
"""Share of a link's published rate that large collectives reach."""
LATENCY_NODE, LATENCY_NETWORK = 20e-6, 50e-6
"""Seconds that a collective takes however small it is."""

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 989.5e12, 0.577, 0.549, 1.5, 3.35e12, 450e9, 50e9, 80 * 2**30),
        Gpu("h100-500w", 989.5e12, 0.516, 0.240, 1.5, 2.4e12, 450e9, 50e9, 96 * 10**9),
        Gpu("h200", 989.5e12, 0.577, 0.549, 1.5, 4.8e12, 450e9, 50e9, 141 * 10**9),
    )
}
"""By name. "h100-500w" is the card of torchtitan's tables: 96 GB of HBM2e, 500 W. The "h200" is taken to compute as the
"h100" does, which no published run was fitted to."""


def gpu_named(name: str) -> Gpu:
    """The GPU of this name. Raises UsageError for another."""
    if name not in GPUS:
        raise UsageError("--gpu is not known", value=name, allowed=near(name, GPUS))
    return GPUS[name]
