"""A plan as plain data, for `herd plan --json` and its tables."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from herd.train.plan.layout import Schedule
from herd.train.plan.memory import memory
from herd.train.plan.search import RECOMPUTES, Choice, Plan


def describe(choice: Choice) -> dict[str, Any]:
    """Everything there is to say: bytes and seconds, nothing rounded. `layout` comes first, innermost axis first."""
    chosen = choice.plan
    layout, settings, step = chosen.layout, chosen.settings, chosen.time
    return {
        "layout": layout.axes(),
        "expert_parallel": layout.ep,
        "settings": asdict(settings)
        | {
            "micro_batches": chosen.job.micro_batches(layout, settings.micro_batch),
            "precision": chosen.job.precision,
            "loss": chosen.job.loss,
            "trainer": chosen.job.trainer,
        },
        "memory": {
            "parts": chosen.memory.parts(),
            "needed": chosen.memory.needed,
            "pipeline_rank": chosen.memory.rank,
        },
        "memory_by_schedule": by_schedule(chosen),
        "communication": {
            axis: {"bytes": step.volume[axis], "seconds": step.parts[axis], "ranks": ranks, "in_node": near}
            for axis, ranks, near in _axes(chosen)
        },
        "time": {"seconds": step.seconds, "parts": step.parts, "bubble": step.bubble},
        "speed": {
            "tokens_per_second_per_gpu": chosen.tokens_per_second,
            "tflops_per_gpu": chosen.tflops,
            "mfu": chosen.mfu,
        },
        "fastest": {
            "layout": choice.fastest.layout.axes(),
            "expert_parallel": choice.fastest.layout.ep,
            "seconds": choice.fastest.time.seconds,
        },
    }


def by_schedule(chosen: Plan) -> dict[str, dict[str, float]]:
    """Bytes that the fullest GPU needs, by pipeline schedule and recomputation, all else as in the plan."""
    virtual = chosen.settings.virtual
    schedules: tuple[Schedule, ...] = ("1f1b",)
    if chosen.layout.pp > 1:
        schedules = ("1f1b", "gpipe") if virtual == 1 else ("1f1b", "interleaved", "gpipe", "looped-bfs")
    found: dict[str, dict[str, float]] = {}
    for schedule in schedules:
        chunks = virtual if schedule in ("interleaved", "looped-bfs") else 1
        found[schedule] = {
            recompute: memory(
                chosen.job,
                chosen.layout,
                replace(chosen.settings, schedule=schedule, virtual=chunks, recompute=recompute),
            ).needed
            for recompute in RECOMPUTES
        }
    return found


def _axes(chosen: Plan) -> list[tuple[str, int, int]]:
    """(axis, ranks, how many of them share a node) of every axis that has a network to itself."""
    layout = chosen.layout
    rows = [(axis, ranks, layout.in_node(axis)) for axis, ranks in layout.axes().items()]
    return [*rows, ("ep", layout.ep, min(layout.ep, layout.in_node("cp", "dp")))]
