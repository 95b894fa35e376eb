"""Time of one training step: products, attention, communication by axis, the pipeline's bubble.

Products and attention run at the rates of hardware.py, everything else at the memory's. Communication of the tensor,
context and expert axes waits for its result and counts whole; that of the data axis and between pipeline stages can
run beside arithmetic, and half of what could be hidden is (`HIDDEN`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from herd.train.plan import own_trainer
from herd.train.plan.hardware import ACHIEVED, Gpu, Link
from herd.train.plan.layout import Job, Layout, Settings
from herd.train.plan.memory import loss_bytes
from herd.train.plan.parts import BF16, FP32, Stage, layer, pipeline, stage_parameters, visible

HIDDEN = 0.5
"""Share of communication beside arithmetic that costs no time; an assumption."""
OPTIMIZER_BYTES = 30
"""Read and written for one parameter by AdamW: gradient, weight and two moments in fp32, and the bf16 copy."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and what they consist of; `volume`: bytes that one GPU receives in a step, by axis.

    `bubble`: seconds in which a pipeline rank has nothing to do, as a share of those in which it has. `flops`: of the
    whole step as MFU counts them, without recomputation.
    """

    seconds: float
    parts: dict[str, float]
    volume: dict[str, float]
    bubble: float
    flops: float


@dataclass(frozen=True)
class Pass:
    """Seconds and bytes of one micro-batch on one stage, forward and backward."""

    compute_forward: float
    compute_backward: float
    tp: float
    cp: float
    ep: float
    tp_bytes: float
    cp_bytes: float
    ep_bytes: float

    @property
    def seconds(self) -> float:
        return self.compute_forward + self.compute_backward + self.tp + self.cp + self.ep


def step_time(job: Job, layout: Layout, settings: Settings, gpu: Gpu) -> StepTime:
    """Of the pipeline's slowest rank, which all others wait for."""
    split = pipeline(job.config, layout.tp, layout.pp, settings.virtual)
    passes = {stage: micro_batch(job, layout, settings, gpu, stage) for stage in set(split)}
    stage = max(passes, key=lambda one: passes[one].seconds)
    work, count = passes[stage], job.micro_batches(layout, settings.micro_batch)
    handed, between = _between_stages(job, layout, settings, gpu, work)
    each = work.seconds + handed
    idle = each * (turns(layout.pp, settings.virtual, count) / settings.virtual - count)
    data, data_bytes = _data(job, layout, settings, gpu, stage, work, count)
    shared, experts = stage_parameters(job.config, layout, stage)
    shards = layout.dp * layout.cp
    own = shared / shards + experts / (shards / layout.ep)
    update = OPTIMIZER_BYTES * own / (gpu.memory_rate * ACHIEVED)
    parts = {
        "compute": count * (work.compute_forward + work.compute_backward),
        "tp": count * work.tp,
        "cp": count * work.cp,
        "ep": count * work.ep,
        "pp": count * handed,
        "dp": data,
        "bubble": idle,
        "optimizer": update,
    }
    volume = {
        "tp": count * work.tp_bytes,
        "cp": count * work.cp_bytes,
        "ep": count * work.ep_bytes,
        "pp": count * between,
        "dp": data_bytes,
    }
    return StepTime(sum(parts.values()), parts, volume, idle / (each * count), model_flops(job))


def turns(pp: int, virtual: int, micro_batches: int) -> int:
    """How many chunks long a step of a pipeline is: `virtual` · `micro_batches` of work and pp - 1 of bubble.

    A chunk's micro-batches can start when the chunk before has passed all ranks, so with fewer micro-batches than
    ranks every further chunk waits too.
    """
    return (virtual - 1) * max(micro_batches, pp) + micro_batches + pp - 1


def model_flops(job: Job) -> float:
    """Of a step: 6 for every multiplied weight and token, and causal attention forward and backward."""
    config, total = job.config, 6.0 * job.config.vocab_size * job.config.dim
    for i in range(config.n_layers):
        whole = config.attention_chunk is None or not config.uses_rope(i)
        attention = 12.0 * config.n_heads * config.head_dim * visible(config, job.seq, whole)
        total += 6.0 * layer(config, 1, 1, config.is_moe_layer(i)).products + attention
    return total * job.batch_tokens


def micro_batch(job: Job, layout: Layout, settings: Settings, gpu: Gpu, stage: Stage) -> Pass:
    """One micro-batch through the layers of one stage, without what its neighbours send."""
    config, tp, cp = job.config, layout.tp, layout.cp
    tokens = settings.micro_batch * job.seq / cp
    wire = (BF16 + job.state_bytes) / 2
    multiply = gpu.peak * gpu.matmul * (gpu.float8 if job.precision == "fp8" else 1.0)
    move = gpu.memory_rate * ACHIEVED
    forward = backward = tp_bytes = cp_bytes = ep_bytes = 0.0
    tp_calls = cp_calls = ep_calls = 0
    for (mixture, whole), count in stage.kinds:
        part = layer(config, tp, layout.ep, mixture)
        products = 2 * tokens * part.products / multiply
        seen = visible(config, job.seq, whole)
        attention = tokens * 4 * config.n_heads * config.head_dim / tp * seen / (gpu.peak * gpu.attention)
        other = tokens * (part.moved + (job.state_bytes - BF16) * 10 * config.dim / tp) / move
        own = job.trainer == "herd"
        chosen = attention * (cp > 1) if own else 2 * tokens * part.again / multiply
        again = {
            "none": 0.0,
            "selective": other + chosen,
            "full": products + attention + other,
        }
        forward += count * (products + attention + other)
        # Flash attention multiplies five times backward for twice forward: the scores are computed again.
        backward += count * (2 * products + 2.5 * attention + 2 * other + again[settings.recompute])
        twice = 1 + (settings.recompute == "full")
        # Sequence parallel: gather before and scatter after both halves of a layer, forward and backward.
        # Herd gathers states and reduces their gradients in fp32, and scatters results and gathers theirs in bf16.
        tp_bytes += count * (4 * twice + 4) * tokens * wire * config.dim * (tp - 1) / tp
        tp_calls += count * (4 * twice + 4)
        # The last of these exchanges, of gradients, is in fp32 in Herd. What computes attention again gathers again.
        shown = 1 + (settings.recompute == "full" or (settings.recompute == "selective" and own))
        kv_bytes = shown + 2 + own
        cp_bytes += count * kv_bytes * _gathered_kv(job, layout, settings, whole)
        cp_calls += count * (shown + 2)
        ep_bytes += count * 2 * (twice + 1) * tokens * part.routed * wire / BF16 * (layout.ep - 1) / layout.ep
        ep_calls += count * 2 * (twice + 1) * mixture
    if stage.output:
        head = 2 * tokens * config.vocab_size * config.dim / tp / multiply
        logits = 2 * loss_bytes_moved(job, tp, tokens) / move
        forward, backward = forward + head + logits / 2, backward + 2 * head + logits / 2
    return Pass(
        forward,
        backward,
        tp=gpu.link(tp, layout.in_node("tp")).seconds(tp_bytes, tp_calls) if tp > 1 else 0.0,
        cp=gpu.link(cp, layout.in_node("cp")).seconds(cp_bytes, cp_calls) if cp > 1 else 0.0,
        ep=_expert_link(layout, gpu).seconds(ep_bytes, ep_calls) if layout.ep > 1 else 0.0,
        tp_bytes=tp_bytes,
        cp_bytes=cp_bytes,
        ep_bytes=ep_bytes,
    )


def loss_bytes_moved(job: Job, tp: int, tokens: float) -> float:
    """Every logit is written and read once in each of its forms, chunked or not."""
    return loss_bytes(replace(job, loss="whole"), tp, tokens)


def _gathered_kv(job: Job, layout: Layout, settings: Settings, whole: bool) -> float:
    """Bytes of keys and values that a rank lacks for its queries (Llama 3 paper, section 3.3.2: all-gather).

    Ranks hold two pieces of the sequence each; with chunked attention a piece needs at most a chunk before it.
    """
    config = job.config
    kv = max(config.n_kv_heads // layout.tp, 1) * config.head_dim
    lacking = job.seq * (layout.cp - 1) / layout.cp
    if not whole and config.attention_chunk is not None:
        lacking = min(lacking, 2 * config.attention_chunk)
    return settings.micro_batch * lacking * 2 * kv * BF16


def _expert_link(layout: Layout, gpu: Gpu) -> Link:
    """Experts are spread over context ranks first, which are nearer, then over data ranks."""
    return gpu.link(layout.ep, min(layout.ep, layout.in_node("cp", "dp")))


def exposed(seconds: float, beside: float) -> float:
    """What remains of communication that runs beside so many seconds of arithmetic."""
    return seconds - HIDDEN * min(seconds, beside)


def _between_stages(job: Job, layout: Layout, settings: Settings, gpu: Gpu, work: Pass) -> tuple[float, float]:
    """Seconds and bytes of handing one micro-batch on, forward and backward, at every chunk of a rank."""
    if layout.pp == 1:
        return 0.0, 0.0
    tokens = settings.micro_batch * job.seq / layout.cp
    sent = 2 * settings.virtual * tokens * job.state_bytes * job.config.dim / layout.tp
    near = layout.pp if layout.in_node("pp") == layout.pp else 1
    seconds = gpu.link(layout.pp, near).seconds(sent, 2 * settings.virtual)
    return exposed(seconds, work.seconds), sent


def _data(
    job: Job, layout: Layout, settings: Settings, gpu: Gpu, stage: Stage, work: Pass, count: int
) -> tuple[float, float]:
    """Seconds and bytes of gathering bf16 parameters and reducing fp32 gradients over data and context ranks.

    Once a step where only the optimiser is sharded; gradients for every micro-batch where they are too (but once where
    a schedule does all backward passes of a chunk in a row); parameters twice for every micro-batch.
    """
    shards = layout.dp * layout.cp
    if shards == 1:
        return 0.0, 0.0
    shared, experts = stage_parameters(job.config, layout, stage)
    link = gpu.link(shards, layout.in_node("cp", "dp"))
    seconds = n_bytes = 0.0
    ends = (job.state_bytes - BF16) * (stage.embedding + stage.output)  # Herd gathers them in fp32
    for parameters, ranks, more in ((shared, shards, ends), (experts, shards // layout.ep, 0)):
        gather = (BF16 * parameters + more) * (ranks - 1) / ranks
        reduce = FP32 * parameters * (ranks - 1) / ranks
        in_a_row = settings.schedule in ("gpipe", "looped-bfs")
        gathers = 2 * count if settings.sharding == "parameters" else 1
        if job.trainer == "herd":
            gathers = own_trainer.gathers(layout, settings.sharding, count)
        reduces = 1 if settings.sharding == "optimizer" or in_a_row else count
        forward = exposed(link.seconds(gather), work.compute_forward)
        backward = exposed(link.seconds(reduce), work.compute_backward)
        seconds += gathers * forward + reduces * backward if parameters else 0.0
        n_bytes += gathers * gather + reduces * reduce
    return seconds, n_bytes
