"""Weights into a model that is split already: no rank ever holds more than its parts and one whole weight.

A model that is built whole on every rank, and split then, does not fit where it is to be trained: 405B weights in fp32
are 1.6 TB. So the split is made of shapes alone (PyTorch's meta device), room is made for a rank's parts, and these are
cut out of one weight after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from herd.architecture import tensor_shapes
from herd.model import read_weight

if TYPE_CHECKING:
    from herd.checkpoint import Checkpoint

Weights = Callable[[str], Tensor]
"""The whole weight of a canonical name, on the CPU."""


def stored(opened: Checkpoint) -> Weights:
    """Those of a checkpoint, as long as it is open. A pipeline's copy of a tied embedding is the embedding.

    They raise HerdError for what the checkpoint lacks or has in another shape.
    """
    shapes = tensor_shapes(opened.config)

    def weight(name: str) -> Tensor:
        name = name if name in shapes else "embed.weight"
        return read_weight(opened, name, shapes[name])

    return weight


@torch.no_grad()
def fill(model: nn.Module, weights: Weights) -> None:
    """Give every parameter of this rank its part of `weights(name)`."""
    for name, parameter in model.named_parameters():
        whole = weights(name.replace("_orig_mod.", ""))
        if hasattr(parameter, "device_mesh"):
            _fill_part(parameter, whole)
        else:
            parameter.copy_(whole)


def _fill_part(parameter: nn.Parameter, whole: Tensor) -> None:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    split: torch.distributed.tensor.DTensor = parameter  # type: ignore[assignment]
    size, offset = compute_local_shape_and_global_offset(whole.shape, split.device_mesh, split.placements)
    split.to_local().copy_(whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))])
