"""The ranks of a run as one small object, so that the loop is written once for one process and for many.

The loop needs of it: its own part of a model and of a micro-batch, sums (gradients, loss, tokens), the gradients' norm,
votes (has any rank been told to stop? is a step to be left out?) and a barrier (has rank 0 written the checkpoint?).
Which rows a rank reads follows from `data_rank` and `data_size` alone. Here are one process and data parallelism with
whole models; a mesh of several axes is `herd.train.parallel`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from herd.train import tensor_files
from herd.train.launch import first_alone, limit_waiting

if TYPE_CHECKING:
    from herd.model import Llama
    from herd.train.parallel.config import ParallelConfig
    from herd.train.parallel.pipeline import Pipeline


T = TypeVar("T")


def autocast(device: torch.device, precision: torch.dtype, *, splits: bool = False) -> torch.autocast:
    """A region whose products are in bf16 if that is the precision.

    It keeps a weight's copy in bf16 until its end; not where weights are gathered for each use (`World.splits`): the
    gradients of later micro-batches would go to a weight that is no more.
    """
    enabled = precision is torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=not splits)


def is_shapes(model: nn.Module) -> bool:
    """Whether a model has no numbers yet."""
    return any(parameter.is_meta for parameter in model.parameters())


class World(Protocol):
    """Ranks 0 … size - 1. Rank `data_rank` of `data_size` reads that share of a step's rows."""

    rank: int
    size: int
    pipeline: Pipeline | None
    """Runs the micro-batches where ranks hold different layers."""
    splits: bool
    """Whether a rank holds parts of weights, which are gathered for each use."""

    @property
    def data_rank(self) -> int: ...

    @property
    def data_size(self) -> int: ...

    def place(self, model: nn.Module, device: torch.device, precision: torch.dtype) -> nn.Module:
        """This rank's part of a model, on `device`; its products are in `precision`.

        All ranks hold the model alike, or as shapes alone (on the meta device): then what they get is to be filled.
        """

    def place_asked(self, model: Llama, device: torch.device, precision: torch.dtype) -> Llama:
        """Room for this rank's part of a model that is only asked, on whole rows, and given as shapes."""

    def let_go(self) -> None:
        """Keep this rank's part of the placed model alone: what a pass without gradients has gathered stays otherwise,
        and the model's parameters are whole until the next backward pass."""

    def local(self, batch: Any) -> Any:
        """This rank's part of a micro-batch."""

    def last_micro_batch(self, last: bool) -> None:
        """Whether the next backward pass is the step's last one."""

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks whose losses add up."""

    def sum_shared_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks that share the same rows."""

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum what is left to sum of gradients after a step's backward passes."""

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Norm of all ranks' summed gradients."""

    def write_tensors(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        """Write what this rank holds of them to files in `directory`."""

    def read_tensors(self, directory: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """What `write_tensors` wrote, on however many ranks, as far as this rank needs it."""

    def whole_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """(name, weight) of the whole model on rank 0; nothing on the others, which must go through it all the same."""

    def aside(self) -> World:
        """The same ranks, for a second thread: what they exchange does not meet what this one exchanges."""

    def from_first(self, numbers: list[float]) -> list[float]:
        """Rank 0's numbers, on every rank."""

    def first(self, action: Callable[[], T]) -> T | None:
        """Let rank 0 do something while the others wait for as long as it takes; what it returns, there."""

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers, on every rank."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def limit_waiting(self) -> None:
        """Let an exchange fail where a rank does not take part in it for long."""


class OneRank:
    """A run in a single process: nothing to exchange."""

    rank = 0
    size = 1
    pipeline: Pipeline | None = None
    splits = False

    @property
    def data_rank(self) -> int:
        return self.rank

    @property
    def data_size(self) -> int:
        return self.size

    def place(self, model: nn.Module, device: torch.device, precision: torch.dtype) -> nn.Module:
        return model.to_empty(device=device) if is_shapes(model) else model.to(device)

    def place_asked(self, model: Llama, device: torch.device, precision: torch.dtype) -> Llama:
        return model.to_empty(device=device)

    def let_go(self) -> None:
        """Nothing was gathered."""

    def local(self, batch: Any) -> Any:
        return batch

    def last_micro_batch(self, last: bool) -> None:
        """Nothing waits for it."""

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Nothing to add."""

    def sum_shared_(self, tensor: Tensor) -> None:
        """No rank shares this one's rows."""

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Nothing to add."""

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return norm

    def write_tensors(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        if self.rank == 0:
            tensor_files.write_tensors(directory, tensors)

    def read_tensors(self, directory: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        return tensor_files.read_tensors(directory)

    def whole_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        if self.rank == 0:
            yield from model.named_parameters()

    def aside(self) -> World:
        return self

    def from_first(self, numbers: list[float]) -> list[float]:
        return numbers

    def first(self, action: Callable[[], T]) -> T | None:
        return action()

    def any(self, flag: bool) -> bool:
        return flag

    def largest(self, number: int) -> int:
        return number

    def barrier(self) -> None:
        """Nobody to wait for."""

    def limit_waiting(self) -> None:
        """Nobody to wait for."""


class ProcessGroup(OneRank):
    """All ranks of torch.distributed, which the launcher has initialised: each has a whole model."""

    group: torch.distributed.ProcessGroup | None = None
    """For votes and barriers; None: the default group."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        works = [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        for p in parameters:  # every rank has a gradient of every weight, or the sums would not match up
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.sum_([p.grad for p in parameters if p.grad is not None])

    def aside(self) -> World:
        world = copy.copy(self)
        world.group = torch.distributed.new_group(backend="gloo")
        return world

    def from_first(self, numbers: list[float]) -> list[float]:
        length = self._exchanged([float(len(numbers))])
        torch.distributed.broadcast(length, 0, group=self.group)
        shared = self._exchanged(numbers if self.rank == 0 else [0.0] * int(length.item()))
        torch.distributed.broadcast(shared, 0, group=self.group)
        return [float(number) for number in shared.tolist()]

    def first(self, action: Callable[[], T]) -> T | None:
        return first_alone(action, self.rank)

    def any(self, flag: bool) -> bool:
        return self.largest(flag) > 0

    def largest(self, number: int) -> int:
        votes = self._exchanged([float(number)])
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(votes.item())

    def _exchanged(self, numbers: list[float]) -> Tensor:
        """Numbers where the group can exchange them."""
        cuda = torch.distributed.get_backend(self.group) == "nccl"
        return torch.tensor(numbers, dtype=torch.float64, device="cuda" if cuda else "cpu")

    def barrier(self) -> None:
        torch.distributed.barrier(self.group)

    def limit_waiting(self) -> None:
        limit_waiting()


def current_world(parallel: ParallelConfig | None = None, device_type: str = "cpu") -> World:
    """The process group if one is initialised, else this process alone; on a mesh if `parallel` asks for one.

    Raises UsageError for a mesh that the ranks cannot make.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        if parallel is not None and parallel.needs_mesh:
            parallel.layout(1)
        return OneRank()
    if parallel is not None and parallel.needs_mesh:
        from herd.train.parallel.world import MeshWorld  # takes a second to import

        return MeshWorld(parallel, device_type)
    return ProcessGroup()
