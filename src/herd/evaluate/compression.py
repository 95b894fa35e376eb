"""What general compressors make of the same text: the yardstick beside a model's bits per byte.

A compressor has never seen the training text, so it is a lower bar than it looks; but it needs no training at all,
and its figure depends on nothing but the bytes. All documents are compressed as one stream, joined with nothing.
"""

from __future__ import annotations

import bz2
import importlib
import importlib.util
import lzma
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from herd.errors import UsageError


@dataclass(frozen=True, slots=True)
class Compressed:
    """Sizes in bytes before and after; bits_per_byte = 8 · size / original."""

    original: int
    size: int
    bits_per_byte: float


def compressors(documents: Iterable[str]) -> dict[str, Compressed]:
    """ "xz -9e", "zstd -19" and "bzip2 -9" over the documents' UTF-8 bytes, in this order.

    zstd is left out where neither the package `zstandard` nor the command `zstd` is there. Raises UsageError
    if there is no text."""
    data = "".join(documents).encode()
    if not data:
        raise UsageError("there is nothing to compress", allowed="at least one byte of text")
    results = {}
    for name, compress in (("xz -9e", _xz), ("zstd -19", _zstd()), ("bzip2 -9", bz2.compress)):
        if compress is not None:
            size = len(compress(data))
            results[name] = Compressed(len(data), size, 8 * size / len(data))
    return results


def _xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


def _zstd() -> Callable[[bytes], bytes] | None:
    """The package where it is installed, else the command, else nothing."""
    if importlib.util.find_spec("zstandard"):
        compressor = importlib.import_module("zstandard").ZstdCompressor(level=19)
        return lambda data: bytes(compressor.compress(data))
    if program := shutil.which("zstd"):
        return lambda data: (
            subprocess.run([program, "-19", "-c", "-q"], input=data, capture_output=True, check=True).stdout
        )
    return None
