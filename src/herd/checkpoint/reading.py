"""Open a checkpoint of any format as one read-only mapping: canonical tensor name → array, one tensor at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from herd.architecture import LlamaConfig, tensor_shapes
from herd.checkpoint.gguf_config import activations_from_gguf
from herd.checkpoint.locate import resolve
from herd.checkpoint.mixes import Activations
from herd.checkpoint.numbers import Array, name_of
from herd.checkpoint.sources import Format, GgufSource, HfSource, MetaSource, Source
from herd.checkpoint.tensorfile import Extent
from herd.errors import FileFormatError, HerdError

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer

__all__ = ["Checkpoint", "RawTensor", "detect_format", "open_checkpoint"]


@dataclass(frozen=True)
class RawTensor:
    """A canonical tensor's bytes. Block formats ("q8_0", "q4_k", …) keep their blocks, plain ones are little-endian."""

    type_name: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


class Checkpoint(Mapping[str, Array]):
    """An open checkpoint. Each access reads that tensor afresh, so memory holds what the caller keeps.

    Arrays have the stored number format (float32, float16, bfloat16); tensors in blocks come as float32.
    """

    def __init__(self, path: Path, source: Source) -> None:
        self.path = path
        self._source = source
        self._shapes = tensor_shapes(source.config)

    @property
    def format(self) -> Format:
        """ "hf", "meta" or "gguf"."""
        return self._source.format

    @property
    def config(self) -> LlamaConfig:
        """The model's shape."""
        return self._source.config

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The configuration as the files have it: config.json, params.json, or the GGUF metadata."""
        return self._source.metadata

    @property
    def activations(self) -> Activations:
        """What shares a scale where the model's activations are rounded to 8 bits."""
        return activations_from_gguf(self.metadata, self.path) if self.format == "gguf" else "block"

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        return [file.path for file in self._source.files]

    @property
    def skipped(self) -> Sequence[str]:
        """Stored tensors that are no part of the text model and were left out."""
        return self._source.skipped

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own tokenizer; HerdError when it has none."""
        from herd import tokenizer

        return tokenizer.load(self.path)

    def __getitem__(self, name: str) -> Array:
        if name not in self._shapes:
            raise KeyError(name)
        return self._source.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a canonical tensor, without reading it."""
        return self._shapes[name]

    def type_name(self, name: str) -> str:
        """Stored format of a canonical tensor ("bf16", "q4_0", …), without reading it."""
        return self._source.type_name(name)

    def raw(self, name: str) -> RawTensor:
        """A tensor's bytes in its stored format, in canonical layout."""
        if isinstance(self._source, GgufSource):
            return RawTensor(self.type_name(name), self._shapes[name], self._source.raw(name))
        array = np.ascontiguousarray(self[name])
        return RawTensor(name_of(array), array.shape, array.reshape(-1).view(np.uint8))

    def extent(self, name: str) -> Extent | None:
        """Where a tensor's bytes lie in a file, as `raw` gives them; None when the file has them in another layout."""
        return self._source.extent(name)

    def close(self) -> None:
        """Close the files."""
        self._source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model: a Hugging Face or Meta directory, a GGUF file, a run directory, or a pulled repository's name.

    Reads headers only. Raises FileFormatError, naming file, field and offset, for damaged or contradictory files, and
    HerdError with near names when there is no such model.
    """
    place = resolve(path)
    fmt, file = detect_format(place)
    source: Source
    if fmt == "hf":
        source = HfSource(file)
    elif fmt == "meta":
        source = MetaSource(file)
    else:
        source = GgufSource(file)
    return Checkpoint(file, source)


def detect_format(path: Path) -> tuple[Format, Path]:
    """Format of the checkpoint at `path` and the file or directory to open."""
    if not path.is_dir():
        if path.suffix == ".safetensors" and (path.parent / "config.json").exists():
            raise HerdError("a safetensors file is only a part of a model", value=path, fix=f"use {path.parent}")
        return "gguf", path  # anything else fails there with "not a GGUF file"
    if any(path.glob("model*.safetensors*")):
        return "hf", path
    if (path / "params.json").exists() and any(path.glob("consolidated*.pth")):
        return "meta", path
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return "gguf", ggufs[0]
    if ggufs:
        raise HerdError("there are several GGUF files here", value=path, allowed=", ".join(file.name for file in ggufs))
    fix = None
    if any(path.glob("pytorch_model*.bin")):
        fix = "pickled Hugging Face weights are not read; get the repository's safetensors"
    elif (path / "checkpoint").is_dir():  # a stage of a run
        fix = f"use {path / 'checkpoint'}"
    raise FileFormatError(
        "no model is in this directory",
        file=path,
        allowed="config.json with model.safetensors, params.json with consolidated.00.pth, or a .gguf file",
        fix=fix,
    )
