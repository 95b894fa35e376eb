"""The safetensors format, read with every rule of its specification checked, and written as a stream.

    u64 header length N · N bytes of JSON: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, …} · data

The tensors' byte ranges must tile the data exactly: no overlap, no hole, nothing behind. Offsets count from the end of
the header. Source: the safetensors README ("Format").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from herd.checkpoint.bytefile import ByteFile
from herd.checkpoint.numbers import PLAIN, Array, cast
from herd.checkpoint.tensorfile import Extent, StoredTensor
from herd.errors import FileFormatError, HerdError
from herd.files import parse_json

__all__ = ["SafetensorsFile", "SafetensorsWriter"]

MAX_DIMS = 8
MAX_HEADER = 25_000_000  # bytes; the largest Llamas need about 200 kB

_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_CODES = {name: code for code, name in _TYPES.items()}
# Bits of every format. Only the first line can hold weights; of the others, that some file has, the extent is checked.
_BITS = {
    "F32": 32, "F16": 16, "BF16": 16,
    "F64": 64, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64,
}  # fmt: skip


class SafetensorsFile:
    """An open safetensors file. Raises FileFormatError naming file, field and offset when any rule is broken."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = ByteFile(path)
        self.path = self._file.path
        try:
            header = self._header()
            self.metadata = self._strings(header.pop("__metadata__", {}))
            self.tensors: Mapping[str, StoredTensor] = self._table(header)
        except BaseException:
            self.close()
            raise

    def rows(self, name: str, first: int, count: int) -> Array:
        """Rows `first` … of tensor `name`, as stored, which must be one of the weight formats."""
        tensor = self.tensors[name]
        dtype, row = PLAIN[tensor.type_name], tensor.shape[1:]
        row_bytes = math.prod(row) * dtype.itemsize
        raw = self._file.array(tensor.offset + first * row_bytes, count * row_bytes, name)
        return raw.view(dtype).reshape(count, *row)

    def extent(self, name: str) -> Extent:
        """Where the bytes of a tensor lie."""
        tensor = self.tensors[name]
        return Extent(self._file.descriptor, tensor.offset, tensor.nbytes)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _header(self) -> dict[str, Any]:
        length = int.from_bytes(self._file.bytes(0, 8, "header length"), "little")
        limit = min(MAX_HEADER, self._file.size - 8)
        if length > limit:
            self._fail("the header cannot be that long", "header length", 0, value=length, allowed=f"at most {limit:,}")
        self._data_start = 8 + length
        raw = self._file.bytes(8, length, "header")
        if raw[:1] != b"{":
            self._fail("the header must start with '{'", "header", 8, value=raw[:1])
        header = parse_json(raw, self.path, "header", offset=8)
        if not isinstance(header, dict):
            self._fail("the header must be a JSON object", "header", 8)
        return header

    def _strings(self, metadata: object) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self._fail("must map text to text", "__metadata__", 8)
        return metadata

    def _table(self, header: dict[str, Any]) -> dict[str, StoredTensor]:
        table: dict[str, StoredTensor] = {}
        spans: list[tuple[int, int, str]] = []
        data_size = self._file.size - self._data_start
        for name, entry in header.items():
            if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
                self._fail("a tensor needs exactly dtype, shape and data_offsets", name, 8, value=entry)
            code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not isinstance(code, str) or code not in _BITS:
                self._fail("unknown number format", f"{name}.dtype", 8, value=code, allowed=", ".join(_TYPES))
            if not _whole_numbers(shape) or len(shape) > MAX_DIMS:
                self._fail("must be up to eight whole numbers", f"{name}.shape", 8, value=shape)
            if not _whole_numbers(offsets) or len(offsets) != 2:
                self._fail("must be two whole numbers", f"{name}.data_offsets", 8, value=offsets)
            begin, end = offsets
            if not begin <= end <= data_size:
                self._fail(
                    "lies outside the file",
                    f"{name}.data_offsets",
                    self._data_start + begin,
                    value=offsets,
                    allowed=f"0 to {data_size:,}",
                )
            if math.prod(shape) * _BITS[code] != (end - begin) * 8:
                self._fail(
                    "shape and dtype do not fill the byte range",
                    f"{name}.shape",
                    self._data_start + begin,
                    value=f"{code} {shape} in {end - begin:,} bytes",
                )
            spans.append((begin, end, name))
            table[name] = StoredTensor(name, _TYPES.get(code, code), tuple(shape), self._data_start + begin)
        self._check_tiling(spans, data_size)
        return table

    def _check_tiling(self, spans: list[tuple[int, int, str]], data_size: int) -> None:
        position, before = 0, "the header"
        for begin, end, name in sorted(spans):
            if begin != position:
                what = f"overlaps {before}" if begin < position else f"leaves a hole behind {before}"
                self._fail(what, f"{name}.data_offsets", self._data_start + begin, value=[begin, end])
            position, before = end, name
        if position != data_size:
            self._fail(
                "bytes behind the last tensor belong to nothing",
                "data",
                self._data_start + position,
                value=f"{data_size - position:,} bytes",
            )

    def _fail(self, what: str, field: str, offset: int | None = None, **details: Any) -> NoReturn:
        raise FileFormatError(what, file=self.path, field=field, offset=offset, **details)


class SafetensorsWriter:
    """Write one safetensors file whose tensors are known beforehand; their data may come in any order.

    `plan` gives name, number format and shape in file order. `metadata` becomes the header's text dictionary.
    """

    def __init__(self, path: Path, plan: Sequence[StoredTensor], metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        position = 0
        for tensor in plan:
            end = position + tensor.nbytes
            header[tensor.name] = {
                "dtype": _CODES[tensor.type_name],
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as the reference writer does
        start = 8 + len(text)
        self._plan = {tensor.name: tensor for tensor in plan}
        self._starts = {t.name: start + header[t.name]["data_offsets"][0] for t in plan}
        self._missing = set(self._plan)
        self._out: IO[bytes] = path.open("wb")
        self._out.write(len(text).to_bytes(8, "little") + text)
        self._out.truncate(start + position)

    def put(self, name: str, blocks: Iterable[Array]) -> None:
        """Write tensor `name` from row blocks, cast to its planned number format."""
        tensor = self._plan[name]
        self._out.seek(self._starts[name])
        for block in blocks:
            self._out.write(np.ascontiguousarray(cast(block, tensor.type_name, name)).view(np.uint8).data)
        written = self._out.tell() - self._starts[name]
        if written != tensor.nbytes:
            raise HerdError(f"{name} has the wrong number of bytes", value=written, allowed=f"{tensor.nbytes:,}")
        self._missing.discard(name)

    def finish(self) -> None:
        """Flush to disk and close."""
        if self._missing:
            raise HerdError("tensors are missing", value=sorted(self._missing)[:3])
        self._out.flush()
        os.fsync(self._out.fileno())
        self._out.close()


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
