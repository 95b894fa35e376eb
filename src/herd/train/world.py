"""The ranks of a run as one small object, so that the loop is written once for one process and for many.

Data parallelism needs three things of it: sums (gradients, loss, tokens), a vote (has any rank been told to stop?)
and a barrier (has rank 0 written the checkpoint?). Which rows a rank reads follows from `rank` and `size` alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed
from torch import Tensor


class World(Protocol):
    """Ranks 0 … size - 1."""

    rank: int
    size: int

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks."""

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""

    def barrier(self) -> None:
        """Wait for all ranks."""


class OneRank:
    """A run in a single process: nothing to exchange."""

    rank = 0
    size = 1

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Nothing to add."""

    def any(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        """Nobody to wait for."""


class ProcessGroup:
    """The ranks of torch.distributed's default group, initialised by whoever launched the run."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        works = [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()

    def any(self, flag: bool) -> bool:
        votes = torch.tensor(float(flag))
        if torch.distributed.get_backend() == "nccl":
            votes = votes.cuda()
        torch.distributed.all_reduce(votes)
        return bool(votes.item() > 0)

    def barrier(self) -> None:
        torch.distributed.barrier()


def current_world() -> World:
    """The process group if one is initialised, else this process alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return ProcessGroup()
    return OneRank()
