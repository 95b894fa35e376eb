"""One view of the three formats: a model's config, and its canonical tensors read one at a time.

Opening reads headers only, and proves that every tensor the config asks for is there with the right shape, and that
nothing else is. What may be there besides: tables that the config determines, and Llama 4's vision encoder, which is
left out (`skipped`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from herd.architecture import IGNORED, LlamaConfig, shard_axis, stored_tensors, tensor_shapes
from herd.checkpoint.gguf import GgufFile
from herd.checkpoint.gguf_config import config_from_gguf
from herd.checkpoint.hf_config import config_from_hf
from herd.checkpoint.layout import read_part, stored_shape
from herd.checkpoint.meta_config import config_from_meta
from herd.checkpoint.numbers import BLOCKS, PLAIN, Array
from herd.checkpoint.safetensors import SafetensorsFile
from herd.checkpoint.shards import check_divisible, shard_shapes, shard_slice
from herd.checkpoint.tensorfile import Extent, StoredTensor, TensorFile
from herd.checkpoint.torchzip import TorchFile
from herd.errors import FileFormatError, UsageError
from herd.files import read_json_object

__all__ = ["GgufSource", "HfSource", "MetaSource", "Source"]

Format = Literal["hf", "meta", "gguf"]

_VISION = {
    "hf": ("vision_model.", "multi_modal_projector."),
    "meta": ("vision_embeddings.", "vision_projection."),
    "gguf": (),
}
_PLAIN_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")


class Source(Protocol):
    """A model in files: `files` hold the weights, `skipped` names stored tensors that the text model does not have."""

    format: Format
    config: LlamaConfig
    metadata: Mapping[str, Any]

    @property
    def files(self) -> Sequence[TensorFile]: ...

    @property
    def skipped(self) -> Sequence[str]: ...

    def read(self, name: str) -> Array:
        """A canonical tensor in a fresh array."""
        ...

    def type_name(self, name: str) -> str:
        """The number format a canonical tensor is stored in."""
        ...

    def extent(self, name: str) -> Extent | None:
        """Where a canonical tensor lies, when the file has it in canonical layout."""
        ...

    def close(self) -> None:
        """Close all files."""
        ...


class _Table:
    """The rules of one format for one config, looked up by canonical name and checked against stored tensors."""

    def __init__(self, fmt: Format, config: LlamaConfig, file: Path, n_stored: int) -> None:
        # Before anything of that size is made: a config with a billion layers costs nothing.
        if config.n_layers > n_stored:
            raise FileFormatError(
                "the config has more layers than there are tensors",
                file=file,
                field="n_layers",
                value=config.n_layers,
                allowed=f"at most {n_stored}",
            )
        self.format, self.config = fmt, config
        self.shapes = tensor_shapes(config)
        self.rules = stored_tensors(fmt, config)
        self.part = {name: (rule, index) for rule in self.rules for index, name in enumerate(rule.parts)}

    def check(
        self,
        stored: Mapping[str, StoredTensor],
        shapes: Mapping[str, tuple[int, ...]],
        place: Path,
        file_of: Callable[[str], Path] | None = None,
    ) -> list[str]:
        """Raise unless `stored` is exactly this model; returns the names that are skipped.

        `place` is what errors name, or the file that `file_of` gives for a stored tensor.
        """
        file_of = file_of or (lambda name: place)
        expected = {rule.stored: rule for rule in self.rules}
        for name, rule in expected.items():
            tensor = stored.get(name)
            if tensor is None:
                raise FileFormatError("a tensor of the model is missing", file=place, field=name)
            if tensor.type_name not in PLAIN and tensor.type_name not in BLOCKS:
                raise FileFormatError(
                    "weights are stored in a format Herd does not read",
                    file=file_of(name),
                    field=name,
                    offset=tensor.offset,
                    value=tensor.type_name,
                    allowed=", ".join([*PLAIN, *BLOCKS]),
                )
            shape = stored_shape(rule, shapes)
            if tensor.shape != shape:
                raise FileFormatError(
                    "the tensor's shape contradicts the config",
                    file=file_of(name),
                    field=name,
                    offset=tensor.offset,
                    value=list(tensor.shape),
                    allowed=str(list(shape)),
                )
        skipped = [name for name in stored if name not in expected]
        for name in skipped:
            if not self._may_skip(name):
                raise FileFormatError(
                    "a tensor that is no part of this Llama", file=file_of(name), field=name, offset=stored[name].offset
                )
        return skipped

    def _may_skip(self, name: str) -> bool:
        tied_copy = self.config.tied_embeddings and name in ("lm_head.weight", "output.weight")
        vision = self.config.generation == "llama4" and name.startswith(_VISION[self.format])
        return tied_copy or vision or name.endswith(IGNORED[self.format])


class HfSource:
    """A Hugging Face directory: config.json and safetensors files, with an index when there are several."""

    format: Format = "hf"

    def __init__(self, directory: Path) -> None:
        self._home: dict[str, SafetensorsFile] = {}
        self.files: list[SafetensorsFile] = []
        config_file = directory / "config.json"
        data = read_json_object(config_file)
        self.config = config_from_hf(data, config_file)
        self.metadata: Mapping[str, Any] = data
        try:
            self._open_files(directory)
            # Llama4ForConditionalGeneration keeps its text model under this prefix.
            nested = any(name.startswith("language_model.") for name in self._home)
            self._prefix = "language_model." if nested else ""
            stored = {name.removeprefix(self._prefix): file.tensors[name] for name, file in self._home.items()}
            self._table = _Table("hf", self.config, config_file, len(stored))
            self.skipped = self._table.check(
                stored, self._table.shapes, directory, lambda name: self._home[self._prefix + name].path
            )
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> Array:
        """A canonical tensor."""
        rule, index = self._table.part[name]
        stored = self._prefix + rule.stored
        file = self._home[stored]
        return read_part(rule, index, self._table.shapes, self.config.head_dim, lambda a, n: file.rows(stored, a, n))

    def type_name(self, name: str) -> str:
        """Its number format."""
        stored = self._prefix + self._table.part[name][0].stored
        return self._home[stored].tensors[stored].type_name

    def extent(self, name: str) -> Extent | None:
        """Where it lies, when the file has it in canonical layout."""
        rule, _ = self._table.part[name]
        stored = self._prefix + rule.stored
        return self._home[stored].extent(stored) if rule.layout == "same" and len(rule.parts) == 1 else None

    def close(self) -> None:
        """Close all files."""
        for file in self.files:
            file.close()

    def _open_files(self, directory: Path) -> None:
        index_file = directory / "model.safetensors.index.json"
        if not index_file.exists():
            self._add(directory / "model.safetensors", None, index_file)
            return
        weight_map = read_json_object(index_file).get("weight_map")
        if not isinstance(weight_map, dict):
            raise FileFormatError("must map tensor names to file names", file=index_file, field="weight_map")
        names: dict[str, set[str]] = {}
        for tensor, name in weight_map.items():
            # Plain names only: an index must not reach outside its own directory.
            if not isinstance(name, str) or not _PLAIN_FILE_NAME.fullmatch(name) or ".." in name:
                raise FileFormatError(
                    "is not the name of a file beside the index",
                    file=index_file,
                    field=f"weight_map.{tensor}",
                    value=name,
                    allowed="plain names ending in .safetensors",
                )
            names.setdefault(name, set()).add(tensor)
        for name, listed in names.items():
            self._add(directory / name, listed, index_file)

    def _add(self, path: Path, listed: set[str] | None, index_file: Path) -> None:
        file = SafetensorsFile(path)
        self.files.append(file)
        for tensor in file.tensors:
            if tensor in self._home:
                raise FileFormatError(f"is also in {self._home[tensor].path.name}", file=path, field=tensor)
            self._home[tensor] = file
        if listed is not None and listed != set(file.tensors):
            odd = min(listed ^ set(file.tensors))
            what = "is in the index but not in the file" if odd in listed else "is in the file but not in the index"
            raise FileFormatError(what, file=path if odd in listed else index_file, field=odd)


class GgufSource:
    """A GGUF file."""

    format: Format = "gguf"

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        self.files: list[GgufFile] = [self._file]
        self.metadata: Mapping[str, Any] = self._file.metadata
        tensors = self._file.tensors
        try:
            embedding = tensors.get("token_embd.weight")
            if embedding is None or len(embedding.shape) != 2:
                raise FileFormatError("the embedding is missing", file=path, field="token_embd.weight")
            divisors = None
            if "rope_freqs.weight" in tensors:
                table = tensors["rope_freqs.weight"]
                if len(table.shape) != 1 or table.count > 1 << 16:
                    raise FileFormatError("is not a frequency table", file=path, field=table.name, offset=table.offset)
                divisors = self._file.rows(table.name, 0, table.count).astype(np.float32)
            self.config = config_from_gguf(
                self._file.metadata,
                path,
                vocab_size=embedding.shape[0],
                tied="output.weight" not in tensors,
                divisors=divisors,
            )
            self._table = _Table("gguf", self.config, path, len(tensors))
            self.skipped = self._table.check(tensors, self._table.shapes, path)
            self._check_vocabulary()
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> Array:
        """A canonical tensor, dequantised to float32 when it is stored in blocks."""
        rule, index = self._table.part[name]
        rows = self._file.rows
        return read_part(rule, index, self._table.shapes, self.config.head_dim, lambda a, n: rows(rule.stored, a, n))

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The stored bytes of a canonical tensor."""
        return self._file.raw(self._table.part[name][0].stored)

    def extent(self, name: str) -> Extent | None:
        """Where they lie."""
        return self._file.extent(self._table.part[name][0].stored)

    def type_name(self, name: str) -> str:
        """Its number or block format."""
        return self._file.tensors[self._table.part[name][0].stored].type_name

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _check_vocabulary(self) -> None:
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list) and len(tokens) != self.config.vocab_size:
            raise FileFormatError(
                "the vocabulary's size contradicts the embedding",
                file=self._file.path,
                field="tokenizer.ggml.tokens",
                value=len(tokens),
                allowed=f"{self.config.vocab_size}",
            )


class MetaSource:
    """A directory of Meta's: params.json and consolidated.NN.pth, one file per model-parallel rank, merged lazily."""

    format: Format = "meta"

    def __init__(self, directory: Path) -> None:
        self.files: list[TorchFile] = []
        params_file, extra_file = directory / "params.json", directory / "herd.json"
        params = read_json_object(params_file)
        extra = read_json_object(extra_file) if extra_file.exists() else None
        self.metadata: Mapping[str, Any] = params
        try:
            self.files = [TorchFile(path) for path in _shard_files(directory)]
            first = self.files[0]
            vocab = self._vocabulary(params, first)
            self.config = config_from_meta(params, params_file, vocab_size=vocab, tied=self._tied(), extra=extra)
            try:
                check_divisible(self.config, len(self.files))
            except UsageError as error:
                raise FileFormatError(error.what, file=params_file, value=error.value) from None
            self._table = _Table("meta", self.config, params_file, len(first.tensors))
            self._shapes = shard_shapes(self._table.shapes, self.config, len(self.files))
            for file in self.files:
                self.skipped = self._table.check(file.tensors, self._shapes, file.path)
            self._check_types()
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> Array:
        """A canonical tensor, joined from its pieces in all shards."""
        if len(self.files) == 1 or shard_axis(name, self.config) is None:
            return self._piece(name, self.files[0])
        shape, shards = self._table.shapes[name], len(self.files)
        out: Array | None = None
        for shard, file in enumerate(self.files):
            piece = self._piece(name, file)
            if out is None:
                out = np.empty(shape, piece.dtype)
            out[shard_slice(name, shape, self.config, shard, shards)] = piece
        assert out is not None
        return out

    def type_name(self, name: str) -> str:
        """Its number format."""
        return self.files[0].tensors[self._table.part[name][0].stored].type_name

    def extent(self, name: str) -> Extent | None:
        """None: a tensor may be in several pieces."""
        return None

    def close(self) -> None:
        """Close all shards."""
        for file in self.files:
            file.close()

    def _piece(self, name: str, file: TorchFile) -> Array:
        rule, index = self._table.part[name]
        return read_part(rule, index, self._shapes, self.config.head_dim, lambda a, n: file.rows(rule.stored, a, n))

    def _check_types(self) -> None:
        """The pieces of a tensor have one number format: joining others would round weights silently."""
        for file in self.files[1:]:
            for name, first in self.files[0].tensors.items():
                piece = file.tensors.get(name)
                if piece is not None and piece.type_name != first.type_name:
                    raise FileFormatError(
                        "the shards store this tensor in different number formats",
                        file=file.path,
                        field=name,
                        offset=piece.offset,
                        value=piece.type_name,
                        allowed=f"{first.type_name}, as in {self.files[0].path.name}",
                    )

    def _vocabulary(self, params: Mapping[str, Any], first: TorchFile) -> int:
        """Rows of the embedding: its shards are cut by width in Llama 1 and 2, by vocabulary from Llama 3 on."""
        tensor = first.tensors.get("tok_embeddings.weight")
        if tensor is None or len(tensor.shape) != 2:
            raise FileFormatError("the embedding is missing", file=first.path, field="tok_embeddings.weight")
        inner = params["model"] if isinstance(params.get("model"), Mapping) else params
        rows, width = tensor.shape
        return rows * len(self.files) if width == inner.get("dim") else rows

    def _tied(self) -> bool:
        """Whether the output head is the embedding: absent, the same storage, or equal to the last bit."""
        return all(_equal(file, "tok_embeddings.weight", "output.weight") for file in self.files)


def _equal(file: TorchFile, one: str, other: str) -> bool:
    a, b = file.tensors.get(one), file.tensors.get(other)
    if b is None or (a is not None and file.same_storage(one, other)):
        return True
    if a is None or a.shape != b.shape or a.type_name != b.type_name or a.type_name not in PLAIN or len(a.shape) != 2:
        return False
    step = max((1 << 20) // max(a.shape[1] * 4, 1), 1)
    return all(
        np.array_equal(
            file.rows(one, first, min(step, a.rows - first)).view(np.uint8),
            file.rows(other, first, min(step, a.rows - first)).view(np.uint8),
        )
        for first in range(0, a.rows, step)
    )


def _shard_files(directory: Path) -> list[Path]:
    single = directory / "consolidated.pth"
    found = sorted(directory.glob("consolidated.*.pth")) or [single]
    if found == [single]:
        return found
    expected = [directory / f"consolidated.{index:02d}.pth" for index in range(len(found))]
    if found != expected:
        missing = next(path for path in expected if path not in found)
        raise FileFormatError("a shard is missing", file=missing, value=[path.name for path in found])
    return found
