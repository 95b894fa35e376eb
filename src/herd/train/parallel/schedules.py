"""Pipeline schedules by name: PyTorch's own, and the interleaved one with a tunable number of contiguous micro-batches.

N, the micro-batches that a chunk takes in a row before the rank turns to its next chunk, is free in the Llama 3 paper
(section 3.3.2): N = pp is depth first, which holds the fewest activations, N = M (all of a step) is breadth first,
which exchanges least often; any N from pp to M works for any M. In PyTorch's interleaved schedule N follows from M.
Which numbers of micro-batches the others can take, `ParallelConfig.schedule_problem` knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    _Action,
    _ComputationType,
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from herd.errors import UsageError
from herd.train.parallel.config import ParallelConfig

_NAMES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "looped-bfs": "LoopedBFS",
    "interleaved-zero-bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}


def chunks_of_rank(config: ParallelConfig, size: int) -> list[list[int]]:
    """The chunks of every pipeline rank: in a loop, or there and back for the V-shaped schedules."""
    if config.schedule in ("zbv", "dualpipev"):
        return [[rank, 2 * size - 1 - rank] for rank in range(size)]
    return [list(range(rank, size * config.virtual, size)) for rank in range(size)]


def build_schedule(config: ParallelConfig, stages: list[PipelineStage], micro_batches: int) -> Any:
    """The schedule over this rank's stages. Raises UsageError for a number of micro-batches that it cannot take: not
    every source of batches gives what the configuration says."""
    keywords: dict[str, Any] = {"n_microbatches": micro_batches, "loss_fn": _loss, "scale_grads": False}
    size = stages[0].group_size
    if problem := config.schedule_problem(micro_batches):
        raise UsageError(
            "a pipeline cannot run this step", value=problem, fix="change batch_size, micro_batch or parallel.schedule"
        )
    if config.schedule == "interleaved":
        return Interleaved(stages, contiguous=config.contiguous or size, **keywords)
    schedule = get_schedule_class(_NAMES[config.schedule])
    return schedule(stages if issubclass(schedule, PipelineScheduleMulti) else stages[0], **keywords)


class Interleaved(_PipelineScheduleRuntime):
    """One forward, one backward in turn over several chunks of a rank, N micro-batches of a chunk in a row."""

    def __init__(self, stages: list[PipelineStage], *, contiguous: int, **keywords: Any) -> None:
        super().__init__(stages, **keywords)  # type: ignore[no-untyped-call]
        size, total = stages[0].group_size, keywords["n_microbatches"]
        self.pipeline_order = {
            rank: interleaved(rank, size, len(stages), total, min(contiguous, total)) for rank in range(size)
        }
        self._prepare_schedule_with_comms(self.pipeline_order)


def interleaved(rank: int, size: int, virtual: int, micro_batches: int, contiguous: int) -> list[_Action | None]:
    """What a rank does, one action after the other.

    Rounds of N micro-batches go through all chunks of the rank before the next round begins. A rank runs so many
    forward passes ahead that the first gradient arrives as it needs it: (virtual - 1)·N for its other chunks and two
    for every rank behind it.
    """
    in_a_row = rounds(size, micro_batches, contiguous)
    forward = list(_passes(in_a_row, range(virtual)))
    backward = list(_passes(in_a_row, reversed(range(virtual))))
    ahead = min((virtual - 1) * in_a_row[0] + 2 * (size - 1 - rank), len(forward))
    # Places are for the simulation that adds sends and receives; None is a turn in which a rank waits.
    order: list[_Action | None] = [None] * rank
    for number in range(len(forward) + ahead):
        if number < len(forward):
            chunk, micro_batch = forward[number]
            order.append(_Action(chunk * size + rank, _ComputationType.FORWARD, micro_batch))
        if number >= ahead:
            chunk, micro_batch = backward[number - ahead]
            order.append(_Action(chunk * size + rank, _ComputationType.FULL_BACKWARD, micro_batch))
    return order


def rounds(size: int, micro_batches: int, contiguous: int) -> list[int]:
    """How many micro-batches a chunk takes in a row, round by round: N, and what is left in the last one.

    Fewer than pp are through before a rank's next chunk can have the first of them, and the rank would wait for a
    gradient of a forward pass that is still ahead of it: so few are spread over the other rounds.
    """
    whole, left = divmod(micro_batches, contiguous)
    if left >= size or not whole:
        return [contiguous] * whole + [left] * (left > 0)
    more, odd = divmod(left, whole)
    return [contiguous + more + (number < odd) for number in range(whole)]


def _passes(in_a_row: Iterable[int], chunks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(chunk of the rank, micro-batch), in order."""
    order, start = list(chunks), 0
    for count in in_a_row:
        for chunk in order:
            for micro_batch in range(start, start + count):
                yield chunk, micro_batch
        start += count


def _loss(output: Tensor, target: Tensor) -> Tensor:
    """The last chunk gives the loss itself."""
    return output
