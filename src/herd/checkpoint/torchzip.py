"""Meta's `.pth` files: an uncompressed zip archive with a pickled table of tensors and one record per storage.

    <stem>/data.pkl · <stem>/byteorder · <stem>/data/0 · <stem>/data/1 · … · <stem>/version

The archive's directory is read with Python's `zipfile`, every range in it is checked against the file, and the pickle
goes through `torchpickle`, which cannot execute anything. Files older than torch 1.6 are no archives and are refused.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.lib.stride_tricks import as_strided

from herd.checkpoint.bytefile import ByteFile
from herd.checkpoint.numbers import PLAIN, Array, cast
from herd.checkpoint.tensorfile import StoredTensor
from herd.checkpoint.torchpickle import PickledTensor, read_state_dict, write_state_dict
from herd.errors import FileFormatError, HerdError

__all__ = ["TorchFile", "TorchWriter"]

MAX_PICKLE = 100_000_000  # bytes; the pickle of a 405B shard has about 200 kB
_ALIGNMENT = 64  # torch aligns storages so, and can then map them
_LOCAL_HEADER = 30
_BYTES_OF = {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class TorchFile:
    """An open `.pth` file. `tensors` has everything in it that is a tensor; nothing in it is ever executed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = ByteFile(path)
        self.path = self._file.path
        try:
            records = self._records()
            pickles = [name for name in records if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                self._fail(
                    "is not a torch checkpoint", "data.pkl", value=f"{len(pickles)} pickles", allowed="exactly one"
                )
            self._prefix = pickles[0].removesuffix("data.pkl")
            self._check_byteorder(records)
            start, size = records[pickles[0]]
            if size > MAX_PICKLE:
                self._fail("is too large", "data.pkl", start, value=size, allowed=f"at most {MAX_PICKLE:,} bytes")
            self._views = read_state_dict(self._file.bytes(start, size, "data.pkl"), self.path)
            self.tensors: Mapping[str, StoredTensor] = {
                name: self._checked(name, view, records) for name, view in self._views.items()
            }
        except BaseException:
            self.close()
            raise

    def rows(self, name: str, first: int, count: int) -> Array:
        """Rows along the first axis, stored in one of the weight formats. Reads the stretch that they span."""
        tensor, view = self.tensors[name], self._views[name]
        dtype = PLAIN[tensor.type_name]
        shape, stride = (count, *tensor.shape[1:]), view.stride
        begin = first * stride[0]
        raw = self._file.array(tensor.offset + begin * dtype.itemsize, _span(shape, stride) * dtype.itemsize, name)
        flat = raw.view(dtype)
        strided = as_strided(flat, shape, [step * dtype.itemsize for step in stride], writeable=False)
        return flat.reshape(shape) if strided.flags.c_contiguous else np.ascontiguousarray(strided)

    def same_storage(self, one: str, other: str) -> bool:
        """True when two names are the very same stretch of one storage, as tied weights are saved."""
        return self._views[one] == self._views[other]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _records(self) -> dict[str, tuple[int, int]]:
        """Record name → (offset of its bytes, length), all of them inside the file and apart from each other."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError, struct.error) as error:
            legacy = self._file.size >= 2 and self._file.bytes(0, 2, "magic") == b"\x80\x02"
            what = "is a torch file from before version 1.6" if legacy else f"is not a complete zip archive ({error})"
            fix = "load it in a sandbox with torch ≥ 1.6 and save it again" if legacy else "download it again"
            self._fail(what, "magic", 0, fix=fix)
        records: dict[str, tuple[int, int]] = {}
        for entry in entries:
            if entry.filename in records:
                self._fail("a record occurs twice", entry.filename, entry.header_offset)
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                self._fail("records must be stored plainly", entry.filename, entry.header_offset)
            header = self._file.bytes(entry.header_offset, _LOCAL_HEADER, entry.filename)
            if header[:4] != b"PK\x03\x04":
                self._fail("the record's header is missing", entry.filename, entry.header_offset)
            name_length, extra_length = struct.unpack_from("<HH", header, 26)
            start = entry.header_offset + _LOCAL_HEADER + name_length + extra_length
            name = self._file.bytes(entry.header_offset + _LOCAL_HEADER, name_length, entry.filename)
            if name != entry.orig_filename.encode():
                self._fail("the record has another name in its header", entry.filename, entry.header_offset, value=name)
            if entry.file_size != entry.compress_size or start + entry.file_size > self._file.size:
                self._fail(
                    "the record lies outside the file",
                    entry.filename,
                    start,
                    value=f"{entry.file_size:,} bytes",
                    allowed=f"at most {max(self._file.size - start, 0):,} bytes",
                )
            records[entry.filename] = (start, entry.file_size)
        position, before = 0, ""
        for record, (start, size) in sorted(records.items(), key=lambda item: item[1]):
            if start < position:
                self._fail(f"overlaps {before}", record, start)
            position, before = start + size, record
        return records

    def _check_byteorder(self, records: Mapping[str, tuple[int, int]]) -> None:
        name = self._prefix + "byteorder"
        if name in records:
            start, size = records[name]
            order = self._file.bytes(start, min(size, 16), name)
            if order != b"little":
                self._fail("numbers must be little-endian", name, start, value=order)

    def _checked(self, name: str, view: PickledTensor, records: Mapping[str, tuple[int, int]]) -> StoredTensor:
        record = records.get(f"{self._prefix}data/{view.key}")
        if record is None:
            self._fail("its storage is not in the file", name, value=view.key)
        start, size = record
        width = PLAIN[view.type_name].itemsize if view.type_name in PLAIN else _BYTES_OF[view.type_name]
        needed = (view.offset + _span(view.shape, view.stride)) * width
        # The second bound refuses views that repeat elements (stride 0) into more than the file has.
        if needed > size or math.prod(view.shape) * width > size:
            self._fail(
                "reaches beyond its storage",
                name,
                start,
                value=f"shape {list(view.shape)}, stride {list(view.stride)}, offset {view.offset}",
                allowed=f"{size // width:,} numbers",
            )
        return StoredTensor(name, view.type_name, view.shape, start + view.offset * width)

    def _fail(self, what: str, field: str, offset: int | None = None, **details: Any) -> NoReturn:
        raise FileFormatError(what, file=self.path, field=field, offset=offset, **details)


class TorchWriter:
    """Write one `.pth` file whose tensors are known beforehand; their data may come in any order.

    `shared` maps a tensor's name to another's whose storage it uses (tied weights): it takes no bytes of its own.
    """

    def __init__(self, path: Path, plan: Sequence[StoredTensor], shared: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._stem = path.stem
        self._plan = {tensor.name: tensor for tensor in plan}
        shared = shared or {}
        own = [tensor.name for tensor in plan if tensor.name not in shared]
        self._keys = {name: str(index) for index, name in enumerate(own)}
        self._missing = set(own)
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        views = []
        for t in plan:
            key = self._keys[shared.get(t.name, t.name)]
            views.append((t.name, PickledTensor(key, t.type_name, t.count, 0, t.shape, _contiguous(t.shape))))
        self._record("data.pkl", write_state_dict(views))
        self._record("byteorder", b"little")

    def put(self, name: str, blocks: Iterable[Array]) -> None:
        """Write the storage of tensor `name` from row blocks, cast to its planned number format."""
        tensor = self._plan[name]
        written = 0
        with self._archive.open(self._entry(f"data/{self._keys[name]}"), "w", force_zip64=True) as record:
            for block in blocks:
                data = np.ascontiguousarray(cast(block, tensor.type_name, name)).view(np.uint8).data
                written += data.nbytes
                record.write(data)
        if written != tensor.nbytes:
            raise HerdError(f"{name} has the wrong number of bytes", value=written, allowed=f"{tensor.nbytes:,}")
        self._missing.discard(name)

    def finish(self) -> None:
        """Write the directory of the archive and flush to disk."""
        if self._missing:
            raise HerdError("tensors are missing", value=sorted(self._missing)[:3])
        self._record("version", b"3\n")
        self._archive.close()
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def _record(self, name: str, data: bytes) -> None:
        with self._archive.open(self._entry(name), "w", force_zip64=True) as record:
            record.write(data)

    def _entry(self, name: str) -> zipfile.ZipInfo:
        """An entry padded, by an extra field that readers skip, so that its data starts at a multiple of 64."""
        entry = zipfile.ZipInfo(f"{self._stem}/{name}")  # the date is 1980-01-01: equal weights give equal files
        zip64_field = 20
        assert self._archive.fp is not None
        start = self._archive.fp.tell() + _LOCAL_HEADER + len(entry.filename.encode()) + 4 + zip64_field
        padding = -start % _ALIGNMENT
        entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        return entry


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last that a strided view touches."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
