"""The whole weights of a model that is split over a mesh, one after the other, on rank 0."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from herd.train.launch import Signal


def whole_weights(model: nn.Module, left_out: frozenset[str] = frozenset()) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of every parameter, on rank 0; nothing on the others, which must go through it all the same.

    Ranks may hold different parameters (pipeline stages). No rank but those of one stage has a whole weight at a time;
    they wait without a limit until those before are dealt with.
    """
    return _walk(model, left_out, Signal())  # made now, since rank 0 may begin the walk later than the others


def _walk(model: nn.Module, left_out: frozenset[str], signal: Signal) -> Iterator[tuple[str, Tensor]]:
    rank, reached = dist.get_rank(), 0
    own = {name: p.detach() for name, p in model.named_parameters() if name not in left_out}
    everyones: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, {name: (p.shape, p.dtype) for name, p in own.items()})
    facts: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
    for holder, held in enumerate(everyones):
        for name, (shape, dtype) in held.items():
            facts.setdefault(name, (holder, shape, dtype))
    for name, (holder, shape, dtype) in facts.items():
        if rank == 0 and holder > reached:
            signal.give(str(holder))
        elif name in own and holder > reached:
            signal.wait(str(holder))
        reached = max(reached, holder)
        weight = None
        if name in own:
            part = own[name]
            weight = part.full_tensor() if hasattr(part, "full_tensor") else part
        if holder == 0:
            pass
        elif rank == holder:
            assert weight is not None
            dist.send(weight.contiguous(), 0)
        elif rank == 0:
            device = next(iter(own.values())).device
            weight = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(weight, holder)
        if rank == 0:
            assert weight is not None
            yield name, weight
