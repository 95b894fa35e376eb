"""The GGUF format: tensors behind the metadata that `herd.ggufmeta` reads, and a writer for both.

    … metadata · n_tensors × (string name, u32 n_dims, n_dims × u64 size innermost first, u32 type, u64 offset)
    · padding to the alignment · data

Offsets count from the start of the data and are multiples of `general.alignment` (32 unless given). A tensor's data is
padded to the alignment as well. Source: the GGUF specification, version 3. Plain formats and the blocks of
`herd.checkpoint.blocks` are read and written; other types are known by name, so that errors can say what a file holds.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import numpy.typing as npt

from herd.checkpoint.blocks import Rounding, dequantize, quantize
from herd.checkpoint.bytefile import ByteFile
from herd.checkpoint.numbers import BLOCKS, PLAIN, Array, cast, name_of, stored_bytes
from herd.checkpoint.tensorfile import Extent, StoredTensor
from herd.errors import FileFormatError, HerdError, UsageError
from herd.files import atomic_write
from herd.ggufmeta import MetadataValue, read_metadata

__all__ = ["GgufFile", "GgufWriter", "dequantize", "quantize", "write"]

DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_NAME = 64  # bytes, by the specification
MAX_DIMS = 4

_TYPES = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_k", 11: "q3_k", 12: "q4_k",
    13: "q5_k", 14: "q6_k", 20: "iq4_nl", 23: "iq4_xs", 30: "bf16",
}  # fmt: skip
_CODES = {name: code for code, name in _TYPES.items()}
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


class GgufFile:
    """An open GGUF file. FileFormatError names file, field and byte offset of anything that cannot be true."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = ByteFile(path)
        self.path = self._file.path
        try:
            head = read_metadata(self.path)
            self.metadata: dict[str, MetadataValue] = head.metadata
            self.version = head.version
            self.alignment = self._alignment()
            cursor = _Cursor(self._file, head.tensor_info_offset)
            infos = [self._info(cursor, index) for index in range(head.n_tensors)]
            self.data_start = -(-cursor.position // self.alignment) * self.alignment
            self.tensors: Mapping[str, StoredTensor] = self._table(infos)
        except BaseException:
            self.close()
            raise

    def rows(self, name: str, first: int, count: int) -> Array:
        """Rows along the outermost axis; block formats are dequantised to float32."""
        tensor = self.tensors[name]
        row = tensor.shape[1:]
        if not row and tensor.type_name in BLOCKS:  # a quantised vector is one row
            whole = dequantize(tensor.type_name, self.raw(name))
            return whole[first : first + count]
        size = stored_bytes(tensor.type_name, row)
        raw = self._file.array(tensor.offset + first * size, count * size, name)
        if tensor.type_name in PLAIN:
            return raw.view(PLAIN[tensor.type_name]).reshape(count, *row)
        return dequantize(tensor.type_name, raw).reshape(count, *row)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor as they lie in the file."""
        tensor = self.tensors[name]
        return self._file.array(tensor.offset, tensor.nbytes, name)

    def extent(self, name: str) -> Extent:
        """Where the bytes of a tensor lie."""
        tensor = self.tensors[name]
        return Extent(self._file.descriptor, tensor.offset, tensor.nbytes)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        usable = type(value) is int and 0 < value <= MAX_ALIGNMENT and value & (value - 1) == 0
        if not usable or not isinstance(value, int):
            self._fail("must be a power of two", "general.alignment", value=value, allowed=f"1 to {MAX_ALIGNMENT:,}")
        return value

    def _info(self, cursor: _Cursor, index: int) -> StoredTensor:
        """One tensor info; `offset` still counts from the start of the data."""
        start = cursor.position
        length = cursor.number("<Q", f"tensor {index} name")
        if not 0 < length <= MAX_NAME:
            self._fail("the name has an impossible length", f"tensor {index} name", start, value=length)
        try:
            name = cursor.take(length, f"tensor {index} name").decode()
        except UnicodeDecodeError:
            self._fail("is not UTF-8 text", f"tensor {index} name", start + 8)
        n_dims = cursor.number("<I", name)
        if not 1 <= n_dims <= MAX_DIMS:
            self._fail("impossible number of dimensions", name, cursor.position - 4, value=n_dims, allowed="1 to 4")
        shape = tuple(reversed([cursor.number("<Q", name) for _ in range(n_dims)]))
        if 0 in shape:
            self._fail("a dimension is empty", name, start, value=list(shape))
        code = cursor.number("<I", name)
        if code not in _TYPES:
            self._fail(
                "weights are stored in a type Herd does not read",
                name,
                cursor.position - 4,
                value=_OTHER_TYPES.get(code, f"type {code}"),
                allowed=", ".join(_CODES),
                fix="convert the original weights with: herd convert SRC DST.gguf --to gguf --dtype q8_0",
            )
        type_name = _TYPES[code]
        if type_name in BLOCKS and shape[-1] % (block := BLOCKS[type_name].weights):
            self._fail("rows must be whole blocks", name, start, value=list(shape), allowed=f"rows of {block}·n")
        return StoredTensor(name, type_name, shape, cursor.number("<Q", name))

    def _table(self, infos: list[StoredTensor]) -> dict[str, StoredTensor]:
        table: dict[str, StoredTensor] = {}
        end, before = 0, "the start of the data"
        for tensor in sorted(infos, key=lambda info: info.offset):
            offset = self.data_start + tensor.offset
            if tensor.name in table:
                self._fail("this tensor occurs twice", tensor.name, offset)
            if tensor.offset % self.alignment:
                self._fail("is not aligned", tensor.name, offset, value=tensor.offset, allowed=f"{self.alignment}·n")
            if tensor.offset < end:
                self._fail(f"overlaps {before}", tensor.name, offset, value=tensor.offset, allowed=f"{end:,} or more")
            end, before = tensor.offset + tensor.nbytes, tensor.name
            if self.data_start + end > self._file.size:
                self._fail(
                    "lies outside the file",
                    tensor.name,
                    offset,
                    value=f"{tensor.nbytes:,} bytes",
                    allowed=f"at most {max(self._file.size - offset, 0):,} bytes",
                    fix="the file is cut off or damaged: copy or convert it again",
                )
            table[tensor.name] = StoredTensor(tensor.name, tensor.type_name, tensor.shape, offset)
        return {info.name: table[info.name] for info in infos}

    def _fail(self, what: str, field: str, offset: int | None = None, **details: Any) -> NoReturn:
        raise FileFormatError(what, file=self.path, field=field, offset=offset, **details)


class _Cursor:
    """Small reads one after the other, through a window so that they are cheap."""

    _WINDOW = 1 << 16

    def __init__(self, file: ByteFile, position: int) -> None:
        self._file = file
        self._window = b""
        self._base = position
        self.position = position

    def take(self, count: int, field: str) -> bytes:
        start = self.position - self._base
        if start + count > len(self._window):
            length = max(count, min(self._WINDOW, self._file.size - self.position))
            self._window = self._file.bytes(self.position, length, field)
            self._base, start = self.position, 0
        self.position += count
        return self._window[start : start + count]

    def number(self, code: str, field: str) -> int:
        return int(struct.unpack(code, self.take(struct.calcsize(code), field))[0])


class GgufWriter:
    """Write one GGUF file whose metadata and tensors are known beforehand; the data may come in any order.

    `plan` gives name, type and shape in file order. Metadata values: bool, str, int (32 bits unsigned where it fits),
    float (32 bits), and lists of one of these (whole numbers in lists are 32 bits signed, as token types must be).
    """

    def __init__(self, out: IO[bytes], metadata: Mapping[str, MetadataValue], plan: Sequence[StoredTensor]) -> None:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        assert isinstance(alignment, int)
        head = [b"GGUF", struct.pack("<IQQ", 3, len(plan), len(metadata))]
        for key, value in metadata.items():
            head.append(_string(key) + _value(key, value))
        position = 0
        offsets: dict[str, int] = {}
        for tensor in plan:
            dims = tuple(reversed(tensor.shape))
            offsets[tensor.name] = position
            head.append(
                _string(tensor.name)
                + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, _CODES[tensor.type_name], position)
            )
            position += -(-tensor.nbytes // alignment) * alignment
        text = b"".join(head)
        start = -(-len(text) // alignment) * alignment
        self._plan = {tensor.name: tensor for tensor in plan}
        self._starts = {name: start + offset for name, offset in offsets.items()}
        self._missing = set(self._plan)
        self._out = out
        out.write(text)
        out.truncate(start + position)

    def put(
        self,
        name: str,
        blocks: Iterable[Array],
        importance: npt.NDArray[np.float32] | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        """Write tensor `name` from row blocks, cast or quantised to its planned type; see `quantize` on the rest.

        Stacked matrices may have `importance` for each, [matrices, N].
        """
        tensor = self._plan[name]
        self._out.seek(self._starts[name])
        first = 0
        for block in blocks:
            if tensor.type_name in BLOCKS:
                try:
                    for part, weights in _weighed(block, importance, first):
                        self._out.write(quantize(tensor.type_name, part, weights, rounding=rounding))
                except HerdError as error:
                    raise error.inside(name) from None
                first += len(block)
            else:
                self._out.write(np.ascontiguousarray(cast(block, tensor.type_name, name)).view(np.uint8).data)
        written = self._out.tell() - self._starts[name]
        if written != tensor.nbytes:
            raise HerdError(f"{name} has the wrong number of bytes", value=written, allowed=f"{tensor.nbytes:,}")
        self._missing.discard(name)

    def finish(self) -> None:
        """Check that nothing is missing; the caller's `atomic_write` flushes."""
        if self._missing:
            raise HerdError("tensors are missing", value=sorted(self._missing)[:3])


def _weighed(
    block: Array, importance: npt.NDArray[np.float32] | None, first: int
) -> Iterable[tuple[Array, npt.NDArray[np.float32] | None]]:
    """A row block with the importance of its columns; matrices `first` … of stacked ones each with their own."""
    if importance is None or importance.ndim == 1:
        return [(block, importance)]
    if len(importance) < first + len(block):
        raise UsageError("stacked matrices need importance for each", value=importance.shape)
    return zip(block, importance[first:], strict=False)


def write(
    path: str | os.PathLike[str],
    metadata: Mapping[str, MetadataValue],
    tensors: Mapping[str, Array],
    types: Mapping[str, str] | None = None,
) -> None:
    """Write a GGUF file atomically. `types` names the format of tensors to cast or quantise (default: their own)."""
    types = types or {}
    plan = [StoredTensor(name, types.get(name, name_of(a)), a.shape) for name, a in tensors.items()]
    for tensor in plan:
        if tensor.type_name in BLOCKS and tensor.shape[-1] % BLOCKS[tensor.type_name].weights:
            raise UsageError(f"{tensor.name}: {tensor.type_name} needs rows of whole blocks", value=tensor.shape)
    with atomic_write(Path(path)) as out:
        writer = GgufWriter(out, metadata, plan)
        for name, array in tensors.items():
            writer.put(name, [array])
        writer.finish()


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


_BOOL, _STRING, _ARRAY = 7, 8, 9


def _value(key: str, value: MetadataValue) -> bytes:
    if not isinstance(value, list):
        code, data = _scalar(key, value)
        return struct.pack("<I", code) + data
    if not value:
        return struct.pack("<IIQ", _ARRAY, _STRING, 0)
    kinds = {type(item) for item in value}
    if kinds == {str}:
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(_string(str(item)) for item in value)
    if kinds == {bool}:
        return struct.pack("<IIQ", _ARRAY, _BOOL, len(value)) + bytes(value)  # type: ignore[arg-type]
    if kinds == {int}:
        return struct.pack("<IIQ", _ARRAY, 5, len(value)) + np.asarray(value, "<i4").tobytes()
    if kinds <= {int, float}:
        return struct.pack("<IIQ", _ARRAY, 6, len(value)) + np.asarray(value, "<f4").tobytes()
    raise UsageError(f"GGUF metadata {key!r} mixes types", value=sorted(kind.__name__ for kind in kinds))


def _scalar(key: str, value: object) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return _BOOL, bytes([value])
    if isinstance(value, str):
        return _STRING, _string(value)
    if isinstance(value, float) and math.isfinite(value):
        return 6, struct.pack("<f", value)
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        if 0 <= value < 1 << 32:
            return 4, struct.pack("<I", value)
        return (10, struct.pack("<Q", value)) if value > 0 else (11, struct.pack("<q", value))
    raise UsageError(f"GGUF metadata {key!r} has no GGUF type", value=value)
