"""Which layout to choose: the fastest that fits into memory, with three rules that a cost model cannot find by itself.

- Tensor parallel ranks stay within a node, unless they are asked for.
- Pipelines run 1F1B schedules, unless others are asked for: those that do all forward passes first hold every
  micro-batch of the step, so a layout would not survive a larger batch on the same GPUs, as Llama 3's ramp needs.
- Context parallel ranks are for sequences that do not fit otherwise: a larger number must be `CONTEXT_GAIN` faster.

The fastest without the last rule is named beside the choice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

from herd.errors import ResourceError, UsageError
from herd.train.plan import own_trainer
from herd.train.plan.hardware import GPUS_PER_NODE, Gpu
from herd.train.plan.layout import (
    Job,
    Layout,
    Recompute,
    Schedule,
    Settings,
    Sharding,
    divisors,
    largest,
    layouts,
    problems,
)
from herd.train.plan.memory import Memory, memory
from herd.train.plan.parts import pipeline
from herd.train.plan.step_time import StepTime, micro_batch, step_time, turns

CONTEXT_GAIN = 0.15
"""Share of a step that more context ranks must save. The Llama 3 paper does without them at 8,192 tokens, where the
model sees up to 12 % in them: the number is set from that choice, not from a measurement."""
MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
SHARDINGS: tuple[Sharding, ...] = ("optimizer", "gradients", "parameters")


@dataclass(frozen=True)
class Plan:
    """A layout, how to run it, and what it is predicted to need."""

    job: Job
    gpu: Gpu
    layout: Layout
    settings: Settings
    memory: Memory
    time: StepTime

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.job.batch_tokens / self.time.seconds / self.layout.gpus

    @property
    def tflops(self) -> float:
        """10¹² floating-point operations per second of one GPU, recomputation not counted."""
        return self.time.flops / self.time.seconds / self.layout.gpus / 1e12

    @property
    def mfu(self) -> float:
        """Share of the GPU's dense bf16 peak."""
        return self.tflops * 1e12 / self.gpu.peak


def make_plan(
    job: Job,
    gpus: int,
    memory_bytes: int,
    gpu: Gpu,
    fixed: dict[str, int] | None = None,
    schedule: Schedule | None = None,
) -> Choice:
    """The plan for `gpus` GPUs of `memory_bytes` each.

    `fixed`: ranks of axes (tp, cp, pp, dp, ep) that are not searched. `schedule`: the only one for pipelines.
    Raises UsageError where nothing divides the job, or not so; ResourceError where nothing of that fits into memory.
    Both name the nearest layout that works.
    """
    fixed = fixed or {}
    every = layouts(job, gpus)
    if not every:
        most = largest(job, gpus)
        raise UsageError(
            f"no layout of so many GPUs divides this model and {job.sequences:,} sequences a step",
            value=gpus,
            fix=f"--gpus {most.gpus}, for example with {most}",
        )
    every = [one for one in every if one.tp <= max(GPUS_PER_NODE, fixed.get("tp", 1))]
    wanted = [one for one in every if _distance(one, fixed) == 0]
    search = _Search(job, memory_bytes, gpu, fixed.get("ep"), schedule)
    found = search.run(wanted)
    if not found:
        _refuse(search, gpus, fixed, every, wanted)
    return _choose(found)


@dataclass(frozen=True)
class Choice:
    """The plan that is chosen, and the fastest one, which may be the same."""

    plan: Plan
    fastest: Plan


def _choose(found: list[Plan]) -> Choice:
    fastest = min(found, key=lambda one: one.time.seconds)
    close = [one for one in found if one.time.seconds <= fastest.time.seconds * (1 + CONTEXT_GAIN)]
    fewest = min(one.layout.cp for one in close)
    return Choice(min((one for one in close if one.layout.cp == fewest), key=lambda one: one.time.seconds), fastest)


@dataclass(frozen=True)
class _Search:
    """Goes through layouts from the least work up and stops where the rest can only be slower."""

    job: Job
    memory_bytes: int
    gpu: Gpu
    ep: int | None
    schedule: Schedule | None

    def run(self, wanted: list[Layout]) -> list[Plan]:
        """Plans that fit, among them the fastest for every number of context ranks that could be chosen."""
        tries = [(self._least(layout, settings), layout, settings) for layout, settings in self.tries(wanted)]
        found: list[Plan] = []
        fastest, of_cp = math.inf, dict[int, float]()
        for least, layout, settings in sorted(tries, key=lambda one: one[0]):
            limit = min(fastest * (1 + CONTEXT_GAIN), of_cp.get(layout.cp, math.inf))
            for schedule, virtual in self._schedules(layout, settings.micro_batch):
                option = replace(settings, schedule=schedule, virtual=virtual)
                count = self.job.micro_batches(layout, settings.micro_batch)
                if least * turns(layout.pp, virtual, count) / (virtual * count) > limit:
                    continue
                for one in self._fitting(layout, option):
                    found.append(one)
                    fastest = min(fastest, one.time.seconds)
                    of_cp[layout.cp] = min(of_cp.get(layout.cp, math.inf), one.time.seconds)
        return found

    def _fitting(self, layout: Layout, option: Settings) -> Iterator[Plan]:
        """For each kind of recomputation the plan that shards least, as sharding less is faster; at last the first."""
        shardings = self._shardings(layout)
        most = len(shardings)
        for recompute in RECOMPUTES:
            for i, sharding in enumerate(shardings[:most]):
                settings = replace(option, recompute=recompute, sharding=sharding)
                needed = memory(self.job, layout, settings)
                if needed.needed <= self.memory_bytes:
                    time = step_time(self.job, layout, settings, self.gpu)
                    yield Plan(self.job, self.gpu, layout, settings, needed, time)
                    most = i
                    break
            if most == 0:
                return

    def least_memory(self, wanted: list[Layout]) -> float:
        """Bytes of a GPU that one of the layouts takes, in the way that takes the fewest."""
        ways = (
            (layout, replace(one, schedule=schedule, virtual=virtual, recompute=recompute, sharding=sharding))
            for layout, one in self.tries(wanted)
            for schedule, virtual in self._schedules(layout, one.micro_batch)
            for recompute in RECOMPUTES
            for sharding in self._shardings(layout)
        )
        return min(memory(self.job, layout, settings).needed for layout, settings in ways)

    def _shardings(self, layout: Layout) -> tuple[Sharding, ...]:
        """The ways to spread weights, those that spread least first."""
        return SHARDINGS if self.job.trainer == "published" else own_trainer.shardings(layout, SHARDINGS)

    def tries(self, wanted: list[Layout]) -> Iterator[tuple[Layout, Settings]]:
        """Every layout, spread of experts and micro-batch that divides the job."""
        for layout in wanted:
            experts = [1] if self.job.config.moe is None else divisors(self.job.config.moe.n_experts)
            for ranks in experts if self.ep is None else [self.ep]:
                spread = replace(layout, ep=ranks)
                if problems(spread, self.job):
                    continue
                # Several sequences cut into many pieces are as much work as one cut into fewer, with more waits.
                for size in MICRO_BATCHES if layout.cp == 1 else MICRO_BATCHES[:1]:
                    if (self.job.sequences // layout.dp) % size == 0:
                        yield spread, Settings(size)

    def _least(self, layout: Layout, settings: Settings) -> float:
        """Seconds that no way to run this layout can be below: its work without recomputation, bubble and data axis."""
        split = pipeline(self.job.config, layout.tp, layout.pp, 1)
        times = {stage: micro_batch(self.job, layout, settings, self.gpu, stage).seconds for stage in set(split)}
        mean = sum(times[stage] for stage in split) / layout.pp
        return mean * self.job.micro_batches(layout, settings.micro_batch)

    def has_schedule(self, wanted: list[Layout]) -> bool:
        """Whether there is a way to run one of the layouts, be it in too little memory."""
        return any(True for layout, one in self.tries(wanted) for _ in self._schedules(layout, one.micro_batch))

    def _schedules(self, layout: Layout, size: int) -> Iterator[tuple[Schedule, int]]:
        """Schedules with the number of model chunks of a rank: interleaved ones with every power of two that fits.

        So few micro-batches that 1F1B cannot run them are all in flight anyway: gpipe is the same then.
        """
        asked, count = self.schedule, self.job.micro_batches(layout, size)
        few = layout.pp > 1 and self.job.trainer == "herd"
        few = few and count < own_trainer.least_micro_batches("1f1b", layout.pp)
        if layout.pp == 1 or asked in (None, "gpipe") or (asked == "1f1b" and not few):
            yield ("gpipe" if asked == "gpipe" or few else "1f1b"), 1
        virtual = 2
        while layout.pp > 1 and virtual * layout.pp <= self.job.config.n_layers + 2:
            if asked == "looped-bfs":
                yield "looped-bfs", virtual
            elif asked in (None, "interleaved") and count % layout.pp == 0:
                yield "interleaved", virtual
            virtual *= 2


def _distance(layout: Layout, fixed: dict[str, int]) -> float:
    """By what factors a layout's mesh differs from what is fixed of it, in powers of two."""
    return sum(abs(math.log2(ranks / fixed.get(axis, ranks))) for axis, ranks in layout.axes().items())


def _refuse(search: _Search, gpus: int, fixed: dict[str, int], every: list[Layout], wanted: list[Layout]) -> NoReturn:
    """Says why nothing was found, and the best of what is nearest to what was asked for."""
    nearest = None
    anew = replace(search, ep=None)

    def distance(layout: Layout) -> float:
        return _distance(layout, fixed)

    for _, group in itertools.groupby(sorted(every, key=distance), distance):
        plans = anew.run(list(group))
        if plans:
            nearest = _choose(plans).plan.layout
            break
    advice = f"the nearest that works is {nearest}" if nearest else "more GPUs, more memory or a shorter sequence"
    if search.has_schedule(wanted):
        size, least = (f"{number / 2**30:.1f} GiB" for number in (search.memory_bytes, search.least_memory(wanted)))
        what = "no such layout fits into the memory of a GPU"
        raise ResourceError(what, value=size, allowed=f"{least} or more", fix=advice)
    asked = " ".join(f"{axis}={ranks}" for axis, ranks in fixed.items())
    if any(True for _ in search.tries(wanted)):
        raise UsageError(
            f"schedule {search.schedule} cannot run this step",
            value=f"{asked or f'{gpus:,} GPUs'}, {search.job.sequences:,} sequences a step",
            allowed=_ALLOWED.get(search.schedule or "", "another --schedule"),
            fix=advice if nearest else "a larger batch, or no --schedule",
        )
    alone = Layout(**({"tp": 1, "cp": 1, "pp": 1, "dp": fixed.get("ep", 1)} | fixed))
    reasons = problems(alone, search.job, gpus if {"tp", "cp", "pp", "dp"} <= set(fixed) else None)
    said = "; ".join(reason for reason in reasons if reason.startswith(tuple(fixed)))
    said = said or f"no layout of {gpus:,} GPUs has these axes"
    raise UsageError(f"the layout {asked} does not work: {said}", fix=advice)


_ALLOWED = {
    "1f1b": "as many micro-batches of a rank as there are pipeline ranks, or more",
    "interleaved": "a multiple of the pipeline ranks as micro-batches of a rank, and layers for two chunks a rank",
    "looped-bfs": "layers for two chunks a rank",
}
"""What a schedule needs."""
