"""What a step is made of: batches of token rows, and the sources that give them as a pure function of the step.

B rows, S tokens of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from herd.corpus import Batch as ArrayBatch
from herd.corpus import RowSource
from herd.errors import UsageError
from herd.train.world import World, current_world


class Batch(NamedTuple):
    """Token rows [B, S] with their targets; targets of weight 0 do not count. See `herd.corpus.Batch`."""

    tokens_BS: Tensor
    targets_BS: Tensor
    document_ids_BS: Tensor
    weights_BS: Tensor

    @classmethod
    def from_arrays(cls, arrays: ArrayBatch) -> Batch:
        """The same batch as tensors that share the arrays' memory."""
        return cls(*(torch.from_numpy(array) for array in arrays))

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    @property
    def n_tokens(self) -> int:
        """Tokens, padding included: those of this rank, where ranks share rows."""
        return self.targets_BS.numel()


class Movable(Protocol):
    """What the loop asks of any batch: to go to a device, and how many tokens it has."""

    @property
    def n_tokens(self) -> int: ...

    def to(self, device: torch.device) -> Any: ...


B = TypeVar("B", bound=Movable)


class BatchSource(Protocol[B]):
    """Where the data comes from. `batch(step)` must give the same micro-batches whenever it is called; equal
    `fingerprint()`s stand for equal data, whatever the rank."""

    def batch(self, step: int) -> list[B]: ...

    def fingerprint(self) -> str: ...


class PackedSource:
    """Micro-batches of packed rows. A rank takes its consecutive share of each step's rows, so that neither the
    number of ranks nor the size of the micro-batches changes which rows a step consists of."""

    def __init__(self, rows: RowSource, micro_batch: int, world: World | None = None) -> None:
        world = world or current_world()
        if rows.batch_size % world.data_size:
            raise UsageError(
                "the rows of a step cannot be shared evenly",
                value=f"batch_size {rows.batch_size} on {world.data_size} ranks",
                allowed=f"a multiple of {world.data_size}",
            )
        share = rows.batch_size // world.data_size
        self._rows, self._micro_batch = rows, micro_batch
        self._first, self._last = world.data_rank * share, (world.data_rank + 1) * share

    def batch(self, step: int) -> list[Batch]:
        """The micro-batches of one optimiser step, for this rank."""
        arrays = self._rows.batch(step, slice(self._first, self._last))
        whole = Batch.from_arrays(arrays)
        parts = [torch.split(tensor, self._micro_batch) for tensor in whole]
        return [Batch(*tensors) for tensors in zip(*parts, strict=True)]

    def fingerprint(self) -> str:
        return self._rows.fingerprint()
