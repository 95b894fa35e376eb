"""Convert a checkpoint from one format to another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from herd.checkpoint.locate import resolve
from herd.checkpoint.reading import Checkpoint, open_checkpoint
from herd.checkpoint.writing import save
from herd.errors import UsageError

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer

__all__ = ["convert"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    shards: int = 1,
    max_shard_bytes: float = 5e9,
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> Path:
    """Write the model `src` to `dst` in format `to` ("hf", "meta", "gguf") and return the path.

    With `dtype` None, or the source's own, every weight keeps its bits; weights in blocks (q8_0, q4_k, …) become
    float32 first. The tokenizer travels along where the source has one. `shards` is the number of Meta's files,
    `max_shard_bytes` the size of one safetensors file; `importance` is as for `save`. Raises what `open_checkpoint` and
    `save` raise.
    """
    place, target = resolve(src), Path(dst)
    if target.exists() and place.resolve().is_relative_to(target.resolve()):
        # A directory is replaced whole: the source would go with it.
        raise UsageError("a checkpoint cannot be converted onto itself", value=dst, fix="choose another name")
    with open_checkpoint(place) as checkpoint:
        return save(
            target,
            checkpoint.config,
            checkpoint,
            format=to,
            dtype=dtype,
            tokenizer=_tokenizer_of(checkpoint),
            metadata={"name": _name_of(checkpoint)},
            shards=shards,
            max_shard_bytes=max_shard_bytes,
            importance=importance,
            label="converting",
        )


def _tokenizer_of(checkpoint: Checkpoint) -> Tokenizer | None:
    """The source's tokenizer; None when there is none. A broken one is an error, not a loss."""
    if checkpoint.format == "gguf":
        return checkpoint.tokenizer if "tokenizer.ggml.tokens" in checkpoint.metadata else None
    if any((checkpoint.path / name).exists() for name in _TOKENIZER_FILES):
        return checkpoint.tokenizer
    return None


def _name_of(checkpoint: Checkpoint) -> str:
    name = checkpoint.metadata.get("general.name")
    return (
        name if isinstance(name, str) else checkpoint.path.stem if checkpoint.path.is_file() else checkpoint.path.name
    )
