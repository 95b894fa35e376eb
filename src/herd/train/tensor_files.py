"""Named tensors in a directory of safetensors files: nothing in them can run code, and any number of ranks reads them.

One process writes one file. Ranks that hold parts of tensors write a file each (herd.train.parallel.checkpoint), whose
header says where each part lies in the whole; `read_tensors` puts them together, so a run that was split over a mesh
goes on in one process, and the other way round.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from herd.errors import FileFormatError

SUFFIX = ".safetensors"
_PARTS = "DCP_SHARDING_INFO"
"""Key of the header under which PyTorch's distributed checkpoints note {name: {"saved_offsets": [...]}}."""


SCALAR = "()"
"""Mark at the end of a name: a tensor without axes, written with one, since parts need an axis to lie along."""


def write_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Write all of them to one file, and to disk."""
    path = directory / f"tensors{SUFFIX}"
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
    sync(path)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, whole. Raises FileFormatError for a file that is none, or parts that do not fit."""
    whole: dict[str, Tensor] = {}
    parts: dict[str, list[tuple[list[int], Tensor]]] = {}
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            with safe_open(path, framework="pt") as file:
                offsets = json.loads((file.metadata() or {}).get(_PARTS, "null"))
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    tensor = file.get_tensor(name)
                    if offsets is None:
                        whole[name] = tensor
                    else:
                        parts.setdefault(name, []).append((offsets[name]["saved_offsets"], tensor))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"is not a file of tensors: {error}", file=path) from None
    whole |= {name: _join(name, directory, found) for name, found in parts.items()}
    return {name.removesuffix(SCALAR): x.reshape(()) if name.endswith(SCALAR) else x for name, x in whole.items()}


def sync(path: Path) -> None:
    """Wait until a file is on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _join(name: str, directory: Path, parts: list[tuple[list[int], Tensor]]) -> Tensor:
    size = [
        max(ends)
        for ends in zip(*([o + s for o, s in zip(at, part.shape, strict=True)] for at, part in parts), strict=True)
    ]
    tensor = torch.empty(size, dtype=parts[0][1].dtype)
    filled = 0
    for offsets, part in parts:
        tensor[tuple(slice(o, o + s) for o, s in zip(offsets, part.shape, strict=True))] = part
        filled += part.numel()
    if filled != tensor.numel():
        raise FileFormatError(
            f"has not all parts of {name}", file=directory, value=f"{filled} of {tensor.numel()} numbers"
        )
    return tensor
