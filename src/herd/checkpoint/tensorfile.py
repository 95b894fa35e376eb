"""What the three file formats have in common: a table of named tensors, read row by row, written in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from herd.checkpoint.numbers import Array, stored_bytes

__all__ = ["Extent", "StoredTensor", "TensorFile", "TensorSink"]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file has it: name, number format, shape (outermost first) and absolute byte offset of its data.

    `type_name` is Herd's name ("bf16", "q8_0", …) where weights can be stored so, else the format's own ("I64").
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the data (weight formats only)."""
        return stored_bytes(self.type_name, self.shape)

    @property
    def rows(self) -> int:
        """Length of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Extent:
    """Where a tensor's bytes lie: an open file's descriptor, byte offset and length."""

    descriptor: int
    offset: int
    nbytes: int


class TensorFile(Protocol):
    """An open file of tensors. Reading a tensor touches that tensor's bytes only."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    def rows(self, name: str, first: int, count: int) -> Array:
        """Rows first … first + count - 1 along the first axis, in a fresh array; block formats become float32."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class TensorSink(Protocol):
    """A file being written: each planned tensor is put once, in any order, as row blocks that follow one another."""

    def put(self, name: str, blocks: Iterable[Array]) -> None:
        """Write tensor `name`; the blocks are cast to its planned number format one by one."""
        ...

    def finish(self) -> None:
        """Complete the file and flush it to disk; an error when a planned tensor was never put."""
        ...
