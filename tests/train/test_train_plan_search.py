"""What divides, what is chosen, and what is said where nothing is."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from herd.architecture import releases
from herd.errors import ResourceError, UsageError
from herd.train.config import TrainConfig
from herd.train.parallel.config import ParallelConfig
from herd.train.plan import GPUS, Job, Layout, Settings, gpu_named, make_plan, problems
from herd.train.plan.hardware import GPUS_PER_NODE
from herd.train.plan.layout import divisors, largest, layouts
from herd.train.plan.memory import memory
from herd.train.plan.search import CONTEXT_GAIN, MICRO_BATCHES, RECOMPUTES, SHARDINGS
from herd.train.plan.step_time import step_time

GIB = 2**30
H100 = GPUS["h100"]
_8B, _405B = releases["llama3.1-8b"].config, releases["llama3.1-405b"].config
SCOUT = releases["llama4-scout-17b-16e"].config


def test_layouts_are_all_factorisations_that_divide() -> None:
    job = Job(_8B, 8192, 2**19)
    every = [Layout(*mesh) for mesh in itertools.product(range(1, 49), repeat=4) if _product(mesh) == 48]
    assert set(layouts(job, 48)) == {layout for layout in every if layout.tp <= 64 and not problems(layout, job)}


def _product(mesh: tuple[int, ...]) -> int:
    a, b, c, d = mesh
    return a * b * c * d


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout(3, 1, 1, 1), "tp=3 does not divide n_heads = 32"),
        (Layout(64, 1, 1, 1), "tp=64 does not divide n_heads = 32"),
        (Layout(1, 3, 1, 1), "cp=3 needs a sequence of a multiple of 2·cp = 6"),
        (Layout(1, 8192, 1, 1), "cp=8192 needs a sequence of a multiple"),
        (Layout(1, 1, 33, 1), "pp=33 is more than the 32 layers"),
        (Layout(1, 1, 1, 3), "dp=3 does not divide the batch of 64 sequences"),
        (Layout(1, 1, 1, 0), "dp=0 is not a whole number"),
        (Layout(1, 1, 1, 2, 2), "ep=2, and the model has no experts"),
    ],
)
def test_what_does_not_divide_is_named(layout: Layout, said: str) -> None:
    assert any(said in reason for reason in problems(layout, Job(_8B, 8192, 2**19)))


def test_problems_of_experts_and_of_the_number_of_gpus() -> None:
    job = Job(SCOUT, 8192, 2**22)
    assert any("does not divide the 16 experts" in reason for reason in problems(Layout(1, 1, 1, 32, 32), job))
    assert any("does not divide cp·dp = 8" in reason for reason in problems(Layout(1, 1, 1, 8, 16), job))
    assert not problems(Layout(1, 4, 1, 4, 16), job)
    assert any("is not the 9 GPUs" in reason for reason in problems(Layout(1, 1, 1, 8), job, 9))
    # 24 heads of which 8 are for keys and values: 12 splits the first kind, and neither divides nor multiplies 8
    three = Job(releases["llama3.2-3b"].config, 8192 * 3, 8192 * 3)
    assert any("n_kv_heads" in reason for reason in problems(Layout(12, 1, 1, 1), three))


def test_tensor_ranks_beyond_key_value_heads_are_allowed() -> None:
    job = Job(_405B, 8192, 2**24, trainer="published")
    assert not problems(Layout(16, 1, 8, 64), job)
    assert make_plan(job, 8192, 80 * GIB, H100, {"tp": 16}).plan.layout.tp == 16
    assert make_plan(job, 8192, 80 * GIB, H100).fastest.layout.tp <= GPUS_PER_NODE


@pytest.mark.parametrize(
    ("gpus", "memory_bytes", "seq", "trainer"), [(16, 40 * GIB, 8192, "published"), (12, 80 * GIB, 16_384, "herd")]
)
def test_the_search_finds_what_trying_everything_finds(gpus: int, memory_bytes: int, seq: int, trainer: Any) -> None:
    job = Job(_8B, seq, 96 * seq, trainer=trainer)
    best: dict[int, float] = {}
    for layout in layouts(job, gpus):
        if layout.tp > GPUS_PER_NODE:
            continue
        ways = [("1f1b", 1)]
        if layout.pp > 1:
            ways += [("interleaved", virtual) for virtual in (2, 4, 8, 16) if virtual * layout.pp <= 34]
        for (schedule, virtual), size, recompute, sharding in itertools.product(
            ways, MICRO_BATCHES, RECOMPUTES, SHARDINGS
        ):
            if trainer == "herd" and layout.pp > 1 and sharding != "optimizer":
                continue  # a pipeline of Herd's reduces gradients once a step
            if 96 // layout.dp % size or (schedule == "interleaved" and 96 // layout.dp // size % layout.pp):
                continue
            settings = Settings(size, schedule, virtual, recompute, sharding)  # type: ignore[arg-type]
            if memory(job, layout, settings).needed <= memory_bytes:
                seconds = step_time(job, layout, settings, H100).seconds
                best[layout.cp] = min(best.get(layout.cp, seconds), seconds)
    choice = make_plan(job, gpus, memory_bytes, H100)
    assert choice.fastest.time.seconds == pytest.approx(min(best.values()))
    fewest = min(cp for cp, seconds in best.items() if seconds <= min(best.values()) * (1 + CONTEXT_GAIN))
    assert choice.plan.layout.cp == fewest
    assert choice.plan.time.seconds == pytest.approx(best[fewest])


def test_experts_are_spread_where_they_do_not_fit() -> None:
    for name, gpus in (("llama4-scout-17b-16e", 512), ("llama4-maverick-17b-128e", 1024)):
        job = Job(releases[name].config, 8192, 2**23)
        chosen = make_plan(job, gpus, 80 * GIB, H100).plan
        assert chosen.layout.ep > 1 and chosen.memory.needed <= 80 * GIB
        assert make_plan(job, gpus, 80 * GIB, H100, {"ep": 8}).plan.layout.ep == 8


def test_a_schedule_that_is_asked_for_is_used() -> None:
    job = Job(_405B, 8192, 2**24, trainer="published")
    for schedule in ("1f1b", "gpipe", "interleaved", "looped-bfs"):
        fixed = {"tp": 8, "pp": 16, "cp": 1}
        assert make_plan(job, 8192, 141 * 10**9, H100, fixed, schedule).plan.settings.schedule == schedule  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "gpus", "sequences", "fixed", "precision"),
    [
        ("llama3.1-8b", 8, 128, {}, "bf16"),
        ("llama3.2-3b", 12, 6, {"pp": 4}, "bf16"),  # two micro-batches for four stages
        ("llama3.1-8b", 6, 1, {}, "bf16"),
        ("llama3.1-8b", 64, 4, {"tp": 2}, "bf16"),
        ("llama4-scout-17b-16e", 64, 3, {"tp": 2}, "bf16"),
        ("llama3.2-1b", 8, 4, {}, "fp8"),  # fewer sequences than GPUs
        ("llama3.1-8b", 8, 8, {"pp": 4}, "fp8"),
    ],
)
def test_our_own_trainer_takes_what_is_planned_for_it(
    model: str, gpus: int, sequences: int, fixed: dict[str, int], precision: Any
) -> None:
    """The configuration that the plan describes passes the checks that a run makes before its first step."""
    job = Job(releases[model].config, 4096, 4096 * sequences, precision, trainer="herd")
    chosen = make_plan(job, gpus, 80 * GIB, H100, fixed).plan
    layout, settings = chosen.layout, chosen.settings
    parallel = ParallelConfig(
        tp=layout.tp,
        cp=layout.cp,
        pp=layout.pp,
        ep=layout.ep,
        shard=True,
        reshard=settings.sharding == "parameters",
        reduce_each=settings.sharding != "optimizer",
        schedule=settings.schedule,
        virtual=settings.virtual,
        recompute=settings.recompute,
    )
    TrainConfig(steps=1, float8=precision == "fp8", parallel=parallel)
    assert parallel.check(job.config, job.seq, job.sequences, settings.micro_batch, gpus) == layout


def test_a_schedule_that_cannot_run_is_not_called_too_large() -> None:
    own = Job(_8B, 8192, 2 * 8192, trainer="herd")
    with pytest.raises(UsageError, match=r"schedule 1f1b cannot run.*got pp=4, 2 sequences.*allowed: as many micro-b"):
        make_plan(own, 4, 80 * GIB, H100, {"pp": 4}, "1f1b")
    with pytest.raises(UsageError, match=r"schedule 1f1b cannot run.*got 3 GPUs.*fix: a larger batch"):
        make_plan(own, 3, 80 * GIB, H100, schedule="1f1b")
    three = Job(_8B, 8192, 3 * 8192)
    with pytest.raises(UsageError, match=r"schedule interleaved cannot run.*multiple.*nearest that works is tp=1 cp=4"):
        make_plan(three, 4, 80 * GIB, H100, {"tp": 1, "pp": 4}, "interleaved")
    with pytest.raises(ResourceError, match="fits into the memory"):
        make_plan(Job(_8B, 8192, 4 * 8192), 4, 8 * GIB, H100, {"tp": 1, "pp": 4}, "interleaved")


def test_our_own_float8_is_not_for_split_matrices() -> None:
    job = Job(_8B, 8192, 2**20, "fp8", trainer="herd")
    with pytest.raises(UsageError, match=r"tp=2 splits matrices, and Herd's own trainer has float8 for whole"):
        make_plan(job, 16, 80 * GIB, H100, {"tp": 2})
    assert make_plan(replace(job, trainer="published"), 16, 80 * GIB, H100, {"tp": 2}).plan.layout.tp == 2


def test_errors_name_the_nearest_that_works() -> None:
    job = Job(_405B, 8192, 2**24, trainer="published")
    with pytest.raises(UsageError, match=r"tp=3 does not divide n_heads = 128.*nearest that works is tp=4 cp=\d+ pp="):
        make_plan(job, 8192, 80 * GIB, H100, {"tp": 3})
    with pytest.raises(UsageError, match=r"= 4,096 is not the 8,192.*nearest that works is tp=8 cp=1 pp=16"):
        make_plan(job, 8192, 80 * GIB, H100, {"tp": 8, "cp": 1, "pp": 16, "dp": 32})
    with pytest.raises(UsageError, match="no layout of 8,192 GPUs has these axes"):
        make_plan(job, 8192, 80 * GIB, H100, {"pp": 3})
    with pytest.raises(
        ResourceError, match=r"no such layout fits.*24\.0 GiB.*nearest that works is tp=[248] "
    ) as error:
        make_plan(job, 8192, 24 * GIB, H100, {"tp": 1, "cp": 1})
    assert error.value.exit_code == 4


def test_without_any_layout_another_number_of_gpus_is_named() -> None:
    job = Job(_8B, 8192, 2**20)
    with pytest.raises(UsageError, match="--gpus 3968, for example with tp=1 cp=1 pp=31 dp=128"):
        make_plan(job, 4093, 80 * GIB, H100)
    small = Job(_8B, 64, 128)
    for gpus in (7, 50, 333, 5000):
        most = largest(small, gpus)
        expected = next(fewer for fewer in range(gpus, 0, -1) if layouts(small, fewer))
        assert most.gpus == expected and not problems(most, small)
    with pytest.raises(ResourceError, match="more GPUs, more memory or a shorter sequence"):
        make_plan(Job(_405B, 8192, 2**24), 8, 80 * GIB, H100)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match=r"multiple of 8,192, such as 16,384"):
        Job(_8B, 8192, 20_000)
    with pytest.raises(UsageError, match="--seq"):
        Job(_8B, 0, 1)
    with pytest.raises(UsageError, match="did you mean 'h100'"):
        gpu_named("h10")


def test_divisors() -> None:
    for number in (1, 2, 36, 97, 8192):
        assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]
