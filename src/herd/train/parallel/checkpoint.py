"""A run's tensors on a mesh: every rank writes what it holds, and reads what it needs of what any other mesh wrote.

PyTorch's distributed checkpoints plan who writes and reads which part; the files are safetensors, since that library's
own format holds a pickle.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from herd.errors import FileFormatError, ResourceError
from herd.train.tensor_files import SCALAR, SUFFIX, sync


def write_parts(directory: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Write this rank's parts. Every rank must call it; the directory is there. `group` is for who writes what.

    Raises ResourceError on every rank when one cannot write.
    """
    state = {name + SCALAR * (t.ndim == 0): t.detach().reshape(1) if t.ndim == 0 else t for name, t in tensors.items()}
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    with _failures("write its part of the checkpoint"):
        save(state, storage_writer=writer, process_group=group)
    if dist.get_rank() == 0:
        for path in directory.glob(f"*{SUFFIX}"):
            sync(path)


def read_parts(directory: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What belongs to this rank's `parameters`, split as they are, and what belongs to none. Every rank must call it.

    A tensor belongs to a parameter if a part of its name, between slashes, is the parameter's; then it has its shape
    or is a scalar. Names with a dot in them are parameters' names: what belongs to other ranks' is left out.
    """
    reader = HuggingFaceStorageReader(str(directory))
    try:
        metadata = reader.read_metadata().state_dict_metadata
    except Exception as error:  # the library raises what the file's reader does
        raise FileFormatError(f"holds no readable tensors: {error}", file=directory) from None
    state: dict[str, Tensor] = {}
    for name, stored in metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        parts = name.removesuffix(SCALAR).split("/")
        owner = next((parameters[part] for part in parts if part in parameters), None)
        if owner is None and any("." in part for part in parts):
            continue
        if owner is not None and stored.size == owner.shape:
            state[name] = torch.zeros_like(owner.detach(), dtype=stored.properties.dtype)
        else:
            state[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    with _failures("read the checkpoint"):
        load(state, storage_reader=HuggingFaceStorageReader(str(directory)))
    return {
        name.removesuffix(SCALAR): tensor.reshape(()) if name.endswith(SCALAR) else tensor
        for name, tensor in state.items()
    }


@contextlib.contextmanager
def _failures(action: str) -> Iterator[None]:
    """Say on all ranks what went wrong on one. The library's error is no Exception: handlers would let it through."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        reason = getattr(cause, "strerror", None) or f"{type(cause).__name__}: {cause}"
        raise ResourceError(
            f"rank {rank} could not {action}: {reason}",
            fix="the same command once that is mended: it goes on from the newest checkpoint",
        ) from None
