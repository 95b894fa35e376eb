"""Compressors: the sizes are those of the real formats, decompressed again by the standard tools."""

from __future__ import annotations

import argparse
import bz2
import inspect
import lzma
import random
import shutil
import subprocess

import pytest

from herd.errors import UsageError
from herd.evaluate import compressors

DOCUMENTS = [inspect.getsource(argparse), "grün und schön ✓\n" * 30, "", inspect.getsource(lzma)]


def test_sizes_of_the_concatenation() -> None:
    data = "".join(DOCUMENTS).encode()
    results = compressors(DOCUMENTS)
    assert list(results) == ["xz -9e", "zstd -19", "bzip2 -9"]
    for result in results.values():
        assert result.original == len(data)
        assert result.bits_per_byte == pytest.approx(8 * result.size / len(data))
    assert results["xz -9e"].size == len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    assert results["bzip2 -9"].size == len(bz2.compress(data, 9))


def test_random_bytes_do_not_compress_and_repeats_do() -> None:
    noise = "".join(random.Random(0).choices("0123456789abcdef", k=40_000))
    for name, result in compressors([noise]).items():
        assert 4.0 <= result.bits_per_byte < 4.8, name  # 4 bits of entropy in each byte
    for result in compressors(["a" * 100_000]).values():
        assert result.bits_per_byte < 0.02


@pytest.mark.skipif(shutil.which("xz") is None, reason="the xz command is not installed")
def test_same_size_as_the_xz_command() -> None:
    data = "".join(DOCUMENTS).encode()
    made = subprocess.run(["xz", "-9e", "-c"], input=data, capture_output=True, check=True).stdout
    assert abs(len(made) - compressors(DOCUMENTS)["xz -9e"].size) <= 8  # the container's own bytes


def test_zstd_decompresses() -> None:
    zstandard = pytest.importorskip("zstandard")
    data = "".join(DOCUMENTS).encode()
    assert compressors(DOCUMENTS)["zstd -19"].size == len(zstandard.ZstdCompressor(level=19).compress(data))


def test_no_text() -> None:
    with pytest.raises(UsageError):
        compressors(["", ""])
