"""Pipeline schedules and numbers of micro-batches: what cannot run is refused with the configuration, all else runs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torch.testing._internal.distributed.fake_pg import FakeStore

from herd.errors import UsageError
from herd.train.parallel import ParallelConfig
from herd.train.parallel.schedules import build_schedule, chunks_of_rank
from tests.train.parallel.cases import shape

TORCH = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "looped-bfs": "LoopedBFS",
    "interleaved-zero-bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}
MICRO_BATCHES = range(1, 12)


@pytest.fixture(params=[2, 3, 4], ids=lambda size: f"pp {size}")
def size(request: pytest.FixtureRequest) -> Iterator[int]:
    """Pipeline ranks, of which this process is the first and the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


def _stages(config: ParallelConfig) -> list[PipelineStage]:
    shapes: dict[str, Any] = {"input_args": torch.zeros(1), "output_args": torch.zeros(1)}
    count, mine = config.pp * config.virtual, chunks_of_rank(config, config.pp)[0]
    return [PipelineStage(torch.nn.Identity(), i, count, torch.device("cpu"), **shapes) for i in mine]


def _check(config: ParallelConfig, micro_batches: int) -> None:
    """As a run does before its first step: a rank's step has so many micro-batches of three rows."""
    config.check(shape(n_layers=12), 32, 3 * micro_batches, 3, config.pp)


def _refused(config: ParallelConfig) -> list[int]:
    found = []
    for micro_batches in MICRO_BATCHES:
        try:
            _check(config, micro_batches)
        except UsageError:
            found.append(micro_batches)
    return found


@pytest.mark.parametrize("schedule", TORCH)
def test_what_torch_cannot_run_is_refused_with_the_configuration(schedule: Any, size: int) -> None:
    virtual = 1 if schedule in ("gpipe", "1f1b") else 2
    config, cannot = ParallelConfig(pp=size, schedule=schedule, virtual=virtual), []
    for micro_batches in MICRO_BATCHES:
        kind = get_schedule_class(TORCH[schedule])
        stages = _stages(config)
        try:
            kind(stages if issubclass(kind, PipelineScheduleMulti) else stages[0], micro_batches)
        except ValueError:
            cannot.append(micro_batches)
            with pytest.raises(UsageError, match=r"a pipeline cannot run this step.*micro-batches"):
                build_schedule(config, stages, micro_batches)
        else:
            build_schedule(config, _stages(config), micro_batches)
    assert _refused(config) == cannot


@pytest.mark.parametrize("virtual", [2, 3])
def test_the_interleaved_schedule_takes_any_number(virtual: int, size: int) -> None:
    """Torch adds sends and receives to it, and finds an order in which no rank waits for ever."""
    for contiguous in (None, size, size + 1):
        config = ParallelConfig(pp=size, schedule="interleaved", virtual=virtual, contiguous=contiguous)
        assert _refused(config) == []
        for micro_batches in MICRO_BATCHES:
            order = build_schedule(config, _stages(config), micro_batches).pipeline_order
            for rank, actions in order.items():
                done = [str(action) for action in actions if action is not None]
                chunks = chunks_of_rank(config, size)[rank]
                passes = ([f"{i}F{m}", f"{i}B{m}"] for i in chunks for m in range(micro_batches))
                assert sorted(done) == sorted(chain(*passes)), "each micro-batch once forward and once back"


def test_the_refusal_says_how_many_there_must_be() -> None:
    with pytest.raises(
        UsageError, match="dualpipev on 2 pipeline ranks needs 4 micro-batches of a step or more, not 2"
    ):
        _check(ParallelConfig(pp=2, virtual=2, schedule="dualpipev"), 2)
    with pytest.raises(UsageError, match="in 2 equal rounds, which its 5 micro-batches do not make"):
        _check(ParallelConfig(pp=2, virtual=2, schedule="interleaved-zero-bubble"), 5)
    with pytest.raises(UsageError, match="contiguous 2 is less than the 4 pipeline ranks"):
        _check(ParallelConfig(pp=4, virtual=2, schedule="interleaved", contiguous=2), 5)
    _check(ParallelConfig(pp=4, virtual=2, schedule="interleaved", contiguous=2), 2)
