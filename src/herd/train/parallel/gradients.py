"""The norm of gradients that are spread over ranks in different ways, by one sum over all of them.

A rank adds the squares of what it holds, each divided by the number of ranks that hold the same numbers: summed over
all ranks, every entry of every gradient counts once, whatever its mesh and placements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """What this rank holds of a parameter's gradient."""
    gradient = parameter.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def copies(parameter: nn.Parameter) -> int:
    """How many ranks of a parameter's mesh hold the same part of it."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(parameter.placements) if placement.is_replicate())


def global_norm(parameters: Iterable[nn.Parameter], twice: frozenset[nn.Parameter] = frozenset()) -> Tensor:
    """Euclidean norm of all ranks' gradients, the same on every rank. `twice`: parameters that two stages hold."""
    squares = []
    for parameter in parameters:
        gradient = local_gradient(parameter)
        if gradient is not None and gradient.numel():
            held_by = copies(parameter) * (2 if parameter in twice else 1)
            squares.append(torch.linalg.vector_norm(gradient.float()).double().square() / held_by)
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
    dist.all_reduce(total)
    return total.sqrt()
