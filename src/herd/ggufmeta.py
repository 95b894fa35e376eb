"""Read the head of a GGUF file: header and key/value metadata, without the tensors.

This is the common ground of the tokenizer room (the vocabulary travels in the metadata) and of the checkpoint
room (which goes on where `tensor_info_offset` points). Nothing in the file is trusted: every count is checked
against the bytes that are left *before* anything of that size is made, so memory stays in proportion to the file.

Layout, little-endian (GGUF specification, versions 2 and 3):

    "GGUF"  u32 version  u64 n_tensors  u64 n_metadata  n_metadata × (string key, u32 type, value)  tensor infos …
    string = u64 length, UTF-8 bytes        array = u32 item type, u64 count, items
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeAlias

from herd.errors import FileFormatError

__all__ = ["GgufMetadata", "MetadataValue", "read_metadata"]

Scalar: TypeAlias = int | float | bool | str
MetadataValue: TypeAlias = Scalar | list[int] | list[float] | list[bool] | list[str]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEY_BYTES = 65_535  # the specification's limit
# Llama 4's vocabulary takes 12 million bytes. A list of small numbers takes 16 times its bytes in the file.
MAX_METADATA = 100_000_000

# Value type numbers of the specification -> struct code. 7 (bool), 8 (string) and 9 (array) are read by hand.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SMALLEST_ENTRY = 8 + 4 + 1  # key length, type, one byte of value
_SMALLEST_TENSOR_INFO = 8 + 4 + 4 + 8  # name length, number of dimensions, type, offset

_U32 = struct.Struct("<I").unpack_from
_U64 = struct.Struct("<Q").unpack_from


class GgufMetadata(NamedTuple):
    """What stands before the tensor infos of a GGUF file."""

    metadata: dict[str, MetadataValue]
    tensor_info_offset: int  # bytes from the start of the file to the first tensor info
    n_tensors: int
    version: int


def read_metadata(path: str | os.PathLike[str]) -> GgufMetadata:
    """Read the metadata of a GGUF file (version 2 or 3, little-endian).

    Numbers become int or float, arrays become lists. Raises `FileFormatError` naming the file, the field and the
    byte offset for anything that is not a well-formed GGUF head: wrong magic or version, counts or strings that
    reach beyond the end of the file, unknown value types, nested arrays, repeated keys, text that is not UTF-8.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:  # mmap refuses an empty file with an error of its own
            raise FileFormatError("the file is empty", file=Path(path), field="magic", offset=0)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, Path(path)).read()


class _Reader:
    """A cursor over the mapped file. `field` is what error messages call the part being read."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.end = len(data)
        self.position = 0
        self.path = path
        self.field = "magic"

    def read(self) -> GgufMetadata:
        if self.data[:4] != MAGIC:
            self.fail("not a GGUF file", value=self.data[:4], allowed="the four bytes 'GGUF'")
        self.position = 4
        self.field = "version"
        version = self.u32()
        if version not in VERSIONS:
            swapped = version & 0xFFFF == 0 and int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "big-endian GGUF files are not supported" if swapped else "unknown GGUF version"
            self.fail(what, value=version, allowed="2 or 3", offset=4)
        self.field = "n_tensors"
        n_tensors = self.u64()
        self.field = "n_metadata"
        n_metadata = self.u64()
        self.check_count(n_metadata, _SMALLEST_ENTRY, "metadata entries")

        metadata: dict[str, MetadataValue] = {}
        for index in range(n_metadata):
            self.field = f"metadata key {index}"
            start = self.position
            key = self.string(MAX_KEY_BYTES)
            if key in metadata:
                self.fail("this metadata key occurs twice", value=key, offset=start)
            self.field = key
            metadata[key] = self.value(self.u32())

        self.field = "n_tensors"
        self.check_count(n_tensors, _SMALLEST_TENSOR_INFO, "tensors")
        return GgufMetadata(metadata, self.position, n_tensors, version)

    def value(self, kind: int) -> MetadataValue:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind == _BOOL:
            return self.bools(1)[0]
        return self.numbers(kind, 1)[0]

    def array(self) -> MetadataValue:
        kind = self.u32()
        count = self.u64()
        if kind == _STRING:
            return self.strings(count)
        if kind == _BOOL:
            return self.bools(count)
        if kind == _ARRAY:
            self.fail("arrays of arrays are not supported", offset=self.position - 12)
        return self.numbers(kind, count)

    def numbers(self, kind: int, count: int) -> list[int] | list[float]:
        code = _NUMBERS.get(kind)
        if code is None:
            self.fail("unknown metadata value type", value=kind, allowed="0 to 12", offset=self.position - 4)
        width = struct.calcsize("<" + code)
        self.check_count(count, width, "array items")
        start = self.position
        self.position = start + count * width
        return list(struct.unpack_from(f"<{count}{code}", self.data, start))

    def bools(self, count: int) -> list[bool]:
        self.check_count(count, 1, "array items")
        start = self.position
        self.position = start + count
        raw = self.data[start : self.position]
        if raw.strip(b"\0\1"):
            self.fail("a boolean must be stored as 0 or 1", offset=start)
        return [byte == 1 for byte in raw]

    def strings(self, count: int) -> list[str]:
        """Vocabularies hold some 400,000 strings, so this loop keeps everything in local names."""
        self.check_count(count, 8, "array items")
        data, end, position = self.data, self.end, self.position
        found: list[str] = []
        append = found.append
        try:
            for _ in range(count):
                start = position + 8
                # `unpack_from` raises struct.error when fewer than 8 bytes are left.
                position = start + _U64(data, position)[0]
                if position > end:
                    raise ValueError("the string reaches beyond the end of the file")
                append(data[start:position].decode())
        except (ValueError, struct.error) as error:  # UnicodeDecodeError is a ValueError
            self.field = f"{self.field}[{len(found)}]"
            if isinstance(error, UnicodeDecodeError):
                self.fail("the string is not UTF-8", offset=start)
            self.fail("the string reaches beyond the end of the file", offset=min(start - 8, end))
        self.position = position
        return found

    def string(self, longest: int | None = None) -> str:
        length = self.u64()
        if longest is not None and length > longest:
            self.fail(
                "the key is too long",
                value=length,
                allowed=f"at most {longest:,} bytes",
                offset=self.position - 8,
            )
        self.check_count(length, 1, "bytes of text")
        start = self.position
        self.position = start + length
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError:
            self.fail("the string is not UTF-8", offset=start)

    def u32(self) -> int:
        self.check_count(1, 4, "32-bit numbers")
        self.position += 4
        return int(_U32(self.data, self.position - 4)[0])

    def u64(self) -> int:
        self.check_count(1, 8, "64-bit numbers")
        self.position += 8
        return int(_U64(self.data, self.position - 8)[0])

    def check_count(self, count: int, width: int, of_what: str) -> None:
        """`count` things of at least `width` bytes must fit in what is left of the file."""
        left = self.end - self.position
        if count * width > left:
            self.fail(
                "the file ends too early" if count == 1 else "the count cannot be true: the file is too short for it",
                value=count,
                allowed=f"at most {left // width:,} {of_what} in the {left:,} bytes that are left",
            )
        if self.position + count * width > MAX_METADATA:
            self.fail(
                "the metadata is far too large for a Llama", value=count, allowed=f"{MAX_METADATA:,} bytes in all"
            )

    def fail(
        self, what: str, *, offset: int | None = None, value: object = None, allowed: str | None = None
    ) -> NoReturn:
        offset = self.position if offset is None else offset
        if value is None:
            raise FileFormatError(what, file=self.path, field=self.field, offset=offset, allowed=allowed)
        raise FileFormatError(what, file=self.path, field=self.field, offset=offset, value=value, allowed=allowed)
