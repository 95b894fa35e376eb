"""A published cluster configuration on one CPU: the real model is split over a mesh of ranks that are not there.

Nothing is computed and no weight has memory (PyTorch's meta device and fake process group), but every split is made as
it would be made: a size that does not divide, a placement that does not fit or a chunk without layers shows in seconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from herd.architecture import LlamaConfig
from herd.errors import UsageError
from herd.model import Llama
from herd.train.parallel.config import ParallelConfig
from herd.train.parallel.world import MeshWorld


@dataclass(frozen=True)
class HeldTensor:
    """What a rank holds of a parameter."""

    name: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    placements: tuple[str, ...]
    """One for each axis of its mesh."""


@dataclass(frozen=True)
class HeldModel:
    """What a rank holds of a model."""

    rank: int
    tensors: tuple[HeldTensor, ...]
    layers: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Numbers that this rank holds; times 4 bytes its fp32 weights, times 16 with gradients and AdamW's state."""
        return sum(torch.Size(tensor.local_shape).numel() for tensor in self.tensors)


def dry_run(config: LlamaConfig, parallel: ParallelConfig, ranks: int, rank: int = 0) -> HeldModel:
    """What rank `rank` out of `ranks` would hold. Raises UsageError for a layout that the model does not allow, and
    where a process group is initialised already."""
    if dist.is_initialized():
        raise UsageError("a dry run needs a process of its own: this one has a process group")
    with _ranks_that_are_not_there(ranks, rank), torch.device("meta"):
        world = MeshWorld(parallel, "cpu")
        model = world.place(Llama(config), torch.device("meta"), torch.bfloat16)
        tensors = tuple(_held(name, parameter) for name, parameter in model.named_parameters())
    layers = sorted({int(t.name.split(".")[1]) for t in tensors if t.name.startswith("layers.")})
    return HeldModel(rank, tensors, tuple(layers))


def _held(name: str, parameter: torch.Tensor) -> HeldTensor:
    assert isinstance(parameter, DTensor)
    local = parameter.to_local()
    return HeldTensor(name, tuple(parameter.shape), tuple(local.shape), tuple(str(p) for p in parameter.placements))


@contextlib.contextmanager
def _ranks_that_are_not_there(ranks: int, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
