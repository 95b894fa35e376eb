"""Memory of one GPU, by part, for every pipeline schedule and kind of recomputation.

Mixed precision as FSDP2 does it: parameters live as fp32 shards with AdamW's two moments, products run on bf16 copies,
gradients are summed and reduced in fp32. Data and context parallel ranks share the shards. What Herd's own trainer
holds otherwise than published runs is in own_trainer.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from herd.train.plan import own_trainer
from herd.train.plan.layout import Job, Layout, Schedule, Settings
from herd.train.plan.parts import BF16, FP32, Layer, Stage, layer, pipeline, stage_parameters

ALLOCATOR = 1.10
"""Bytes that torch's allocator holds for every byte in use. The geometric mean of what two of torchtitan's rows need:
8B at 32K tokens on 8 GPUs (83.9 GiB), and 405B with interleaved 1F1B on 512 (72.7 GiB)."""
CONTEXT = int(1.5 * 2**30)
"""Bytes that CUDA and NCCL take for themselves: an estimate. torchtitan's figures do not have them."""
CHUNK_BYTES = 512 * 2**20
"""Logits of one chunk with their gradient, where the loss is chunked."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU. `activations`: of all micro-batches in flight, and the largest need of one moment.

    `total` has the allocator's losses, and is what torch reports as reserved; `needed` adds CUDA's own.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    rank: int

    @property
    def total(self) -> float:
        return ALLOCATOR * (self.weights + self.gradients + self.optimizer + self.activations)

    @property
    def needed(self) -> float:
        return self.total + CONTEXT

    def parts(self) -> dict[str, float]:
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "allocator": self.total / ALLOCATOR * (ALLOCATOR - 1),
            "context": float(CONTEXT),
        }


def memory(job: Job, layout: Layout, settings: Settings) -> Memory:
    """Of the pipeline rank that needs most."""
    split = pipeline(job.config, layout.tp, layout.pp, settings.virtual)
    # What is in flight falls from rank to rank, layers differ on the ends only, and the last has the logits.
    ranks = sorted({0, min(1, layout.pp - 1), layout.pp // 2, layout.pp - 1})
    return max((_of_rank(job, layout, settings, split[rank], rank) for rank in ranks), key=lambda one: one.total)


def _of_rank(job: Job, layout: Layout, settings: Settings, stage: Stage, rank: int) -> Memory:
    config = job.config
    shared, experts = stage_parameters(config, layout, stage)
    shards = layout.dp * layout.cp
    held, own = shared + experts, shared / shards + experts / (shards / layout.ep)
    block = max(part.shared + part.experts for part in _layers(job, layout, stage)) if stage.kinds else 0
    # Gathered layer by layer: the one at work and the next; embedding and output stay.
    ends = stage.embedding + stage.output
    blocks = 2 * block if settings.sharding == "parameters" else held - ends
    whole, ends_bytes = block, BF16 * ends
    if job.trainer == "herd":
        # The output's gradient is there from the loss on, the embedding's at the end; both are reduced last.
        table = config.vocab_size * config.dim // layout.tp if stage.output else 0
        whole = table + (block if table and config.tied_embeddings else max(block, stage.embedding))
        ends_bytes = FP32 * ends if layout.gpus > 1 else 0  # one process works on the weights themselves
    gradients = own + (held if settings.sharding == "optimizer" else whole)
    if layout.dp * layout.cp == 1:  # nothing to gather from others, nothing to reduce
        gradients = held
    return Memory(
        weights=BF16 * blocks + ends_bytes,
        gradients=FP32 * gradients,
        optimizer=3 * FP32 * own,
        activations=_activations(job, layout, settings, stage, rank),
        rank=rank,
    )


def _activations(job: Job, layout: Layout, settings: Settings, stage: Stage, rank: int) -> float:
    tokens = settings.micro_batch * job.seq / layout.cp
    micro_batches = job.micro_batches(layout, settings.micro_batch)
    chunks = in_flight(settings.schedule, layout.pp, settings.virtual, micro_batches, rank)
    of_layers = sum(count * _kept(job, layout, mixture)[settings.recompute] for (mixture, _), count in stage.kinds)
    moment = max(
        _backward_moment(job, layout, settings, stage, tokens),
        loss_bytes(job, layout.tp, tokens) if stage.output else 0.0,
    )
    sent = job.state_bytes * job.config.dim / layout.tp if layout.pp > 1 else 0.0  # torch keeps it until its turn
    buffers = own_trainer.received(job.config, layout, settings, micro_batches) if job.trainer == "herd" else 0.0
    return tokens * (chunks * (of_layers / settings.virtual + sent) + buffers) + moment


def _kept(job: Job, layout: Layout, mixture: bool) -> dict[str, float]:
    """Bytes per token that a layer keeps for the backward pass, by recomputation."""
    if job.trainer == "herd":
        return own_trainer.kept(job.config, layout, mixture)
    return layer(job.config, layout.tp, layout.ep, mixture).kept


def in_flight(schedule: Schedule, pp: int, virtual: int, micro_batches: int, rank: int) -> int:
    """Model chunks whose activations a pipeline rank holds at most, of its `virtual` · `micro_batches`.

    Forward-first schedules (gpipe, looped-bfs) hold all. 1F1B holds pp - rank (arXiv 1806.03377); interleaved 1F1B
    warms up with 2·(pp - 1 - rank) + (virtual - 1)·pp chunks and holds one more (arXiv 2104.04473).
    """
    every = virtual * micro_batches
    if schedule in ("gpipe", "looped-bfs"):
        return every
    if schedule == "1f1b":
        return min(every, pp - rank)
    return min(every, (virtual - 1) * pp + 2 * (pp - 1 - rank) + 1)


def _backward_moment(job: Job, layout: Layout, settings: Settings, stage: Stage, tokens: float) -> float:
    """What the backward pass of one layer needs for a while: what is computed again, gradients, gathered inputs."""
    config, largest = job.config, 0.0
    kv = max(config.n_kv_heads // layout.tp, 1) * config.head_dim
    for (mixture, _), _count in stage.kinds:
        part, kept = layer(config, layout.tp, layout.ep, mixture), _kept(job, layout, mixture)
        again = 0.0 if settings.recompute == "none" else kept["none"] - kept["full"]
        whole_input = 2 * job.state_bytes * config.dim if layout.tp > 1 else 0
        largest = max(largest, again + part.hidden + whole_input)
    gathered = 0 if layout.cp == 1 else settings.micro_batch * job.seq * 2 * kv * (BF16 + FP32)
    return tokens * largest + gathered


def loss_bytes(job: Job, tp: int, tokens: float) -> float:
    """What the logits take. Whole: in bf16, and in fp32 log-probabilities and two gradients, 14 bytes a logit. With the
    vocabulary in parts torch's loss_parallel has the gradient, its sum with the probabilities and a product: 18."""
    if job.trainer == "herd" and job.loss == "chunked":
        return own_trainer.loss_bytes(job.config, tp, tokens)
    whole = tokens * job.config.vocab_size / tp * (14 if tp == 1 else 18)
    return whole if job.loss == "whole" else min(whole, float(CHUNK_BYTES))


def _layers(job: Job, layout: Layout, stage: Stage) -> list[Layer]:
    return [layer(job.config, layout.tp, layout.ep, mixture) for (mixture, _), _ in stage.kinds]
