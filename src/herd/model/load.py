"""Weights in and out of the torch module, one tensor at a time. Files and formats are `herd.checkpoint`'s business."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from herd.architecture import LlamaConfig, tensor_shapes
from herd.errors import HerdError
from herd.model.llama import Llama

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Llama:
    """The model of any checkpoint: a Hugging Face or Meta directory, or a GGUF file.

    `dtype` None keeps the precision of the stored embedding (float32 for quantised files). Raises HerdError for files
    that are damaged or not a Llama.
    """
    from herd.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        return from_arrays(checkpoint.config, checkpoint, dtype=dtype, device=device)


def from_arrays(
    config: LlamaConfig,
    arrays: Mapping[str, npt.NDArray[Any]],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Llama:
    """A model from arrays under their canonical names. Raises HerdError for a missing tensor or a wrong shape."""
    with torch.device("meta"):
        model = Llama(config)
    for name, shape in tensor_shapes(config).items():
        tensor = read_weight(arrays, name, shape)
        dtype = tensor.dtype if dtype is None else dtype
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        owner.register_parameter(leaf, nn.Parameter(tensor.to(device=device, dtype=dtype)))
    return model


def read_weight(arrays: Mapping[str, npt.NDArray[Any]], name: str, shape: tuple[int, ...]) -> Tensor:
    """One weight in the precision it is stored in. Raises HerdError when it is missing or has another shape."""
    if name not in arrays:
        raise HerdError(f"the checkpoint has no tensor {name!r}", fix="herd convert the original checkpoint again")
    array = arrays[name]
    if tuple(array.shape) != shape:
        raise HerdError(f"tensor {name!r} has the wrong shape", value=tuple(array.shape), allowed=str(shape))
    return to_tensor(array)


def state_arrays(model: nn.Module) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """(canonical name, numpy array) of every tensor, in file order, for `herd.checkpoint.save`."""
    for name, parameter in model.named_parameters():
        yield name.replace("_orig_mod.", ""), to_array(parameter)


def to_tensor(array: npt.NDArray[Any]) -> Tensor:
    """A torch copy of a numpy array; knows bfloat16."""
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def to_array(tensor: Tensor) -> npt.NDArray[Any]:
    """A numpy array of a tensor's values; knows bfloat16. On the CPU it shares the tensor's memory."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()
