"""The GGUF metadata reader: equal to what the `gguf` package wrote, and an error naming the place for the rest."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.errors import FileFormatError
from herd.ggufmeta import read_metadata

SCALARS = {
    "a.uint8": (gguf.GGUFWriter.add_uint8, 255),
    "a.int8": (gguf.GGUFWriter.add_int8, -128),
    "a.uint16": (gguf.GGUFWriter.add_uint16, 65535),
    "a.int16": (gguf.GGUFWriter.add_int16, -32768),
    "a.uint32": (gguf.GGUFWriter.add_uint32, 2**32 - 1),
    "a.int32": (gguf.GGUFWriter.add_int32, -(2**31)),
    "a.float32": (gguf.GGUFWriter.add_float32, 0.5),
    "a.uint64": (gguf.GGUFWriter.add_uint64, 2**64 - 1),
    "a.int64": (gguf.GGUFWriter.add_int64, -(2**63)),
    "a.float64": (gguf.GGUFWriter.add_float64, 0.1),
    "a.true": (gguf.GGUFWriter.add_bool, True),
    "a.false": (gguf.GGUFWriter.add_bool, False),
    "a.string": (gguf.GGUFWriter.add_string, "🦙 llama"),
    "a.empty": (gguf.GGUFWriter.add_string, ""),
}
ARRAYS: dict[str, list[object]] = {
    "b.ints": [1, -2, 3],
    "b.floats": [0.25, -1.5],
    "b.bools": [True, False, True],
    "b.strings": ["", "▁the", "Ġx", "\x00"],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, (add, value) in SCALARS.items():
        # the package leaves empty strings out by itself, so that one is forced
        if value == "":
            writer.add_key_value(key, value, gguf.GGUFValueType.STRING)
        else:
            add(writer, key, value)
    for key, values in ARRAYS.items():
        writer.add_array(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path.read_bytes()


def read(data: bytes, folder: Path) -> object:
    path = folder / "mutated.gguf"
    path.write_bytes(data)
    return read_metadata(path)


def test_reads_what_the_gguf_package_writes(written: bytes, tmp_path: Path) -> None:
    found = read(written, tmp_path)
    expected = {key: value for key, (_, value) in SCALARS.items()} | ARRAYS | {"general.architecture": "llama"}
    assert found.metadata == expected
    assert {type(found.metadata[key]) for key in ("a.true", "a.false")} == {bool}
    assert (found.tensor_info_offset, found.n_tensors, found.version) == (len(written), 0, 3)


def test_reads_a_released_vocabulary_as_the_gguf_package_does(shared_data: Path) -> None:
    path = shared_data / "tokenizers" / "ggml-vocab-llama-spm.gguf"
    ours = read_metadata(path).metadata
    theirs = gguf.GGUFReader(path)
    assert len(ours["tokenizer.ggml.tokens"]) == 32_000
    for key, value in ours.items():
        assert theirs.fields[key].contents() == value


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def file_with(*entries: bytes, n_tensors: int = 0, version: int = 3, count: int | None = None) -> bytes:
    n = len(entries) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n) + b"".join(entries)


STRING_100 = struct.pack("<Q", 100) + b"short"
BAD = {
    "empty": (b"", "magic", 0),
    "not gguf": (b"\x80\x04\x95pickle", "magic", 4),
    "cut magic": (b"GG", "magic", 0),
    "cut version": (b"GGUF\x03", "version", 4),
    "version 1": (file_with(version=1), "version", 4),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version", 4),
    "huge count": (file_with(count=2**62), "n_metadata", 24),
    "huge tensors": (file_with(n_tensors=2**60), "n_tensors", 24),
    "count too large": (file_with(entry(b"a" * 20, 4, b"\0\0\0\0"), count=2), "metadata key 1", 60),
    "key too long": (file_with(entry(b"k" * 70_000, 0, b"\0")), "metadata key 0", 24),
    "key not text": (file_with(entry(b"\xff\xfe", 0, b"\0")), "metadata key 0", 32),
    "twice": (file_with(entry(b"a", 0, b"\0"), entry(b"a", 0, b"\0")), "metadata key 1", 38),
    "unknown type": (file_with(entry(b"a", 13, b"\0")), "a", 33),
    "string beyond": (file_with(entry(b"a", 8, STRING_100)), "a", 45),
    "bool of 2": (file_with(entry(b"a", 7, b"\2")), "a", 37),
    "array beyond": (file_with(entry(b"a", 9, struct.pack("<IQ", 4, 2**61) + b"\0" * 9)), "a", 49),
    "strings beyond": (file_with(entry(b"a", 9, struct.pack("<IQ", 8, 2) + STRING_100 + b"\0" * 9)), "a[0]", 49),
    "strings not text": (file_with(entry(b"a", 9, struct.pack("<IQQ", 8, 1, 1) + b"\xff")), "a[0]", 57),
    "nested": (file_with(entry(b"a", 9, struct.pack("<IQ", 9, 1) + b"\0" * 20)), "a", 37),
    "array of 13": (file_with(entry(b"a", 9, struct.pack("<IQ", 13, 1) + b"\0" * 20)), "a", 45),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_field_and_offset(name: str, tmp_path: Path) -> None:
    data, field, offset = BAD[name]
    with pytest.raises(FileFormatError) as caught:
        read(data, tmp_path)
    assert (caught.value.field, caught.value.file) == (field, str(tmp_path / "mutated.gguf"))
    assert caught.value.offset is not None and abs(caught.value.offset - offset) <= 4


def test_a_number_of_strings_that_cannot_be_takes_no_memory(tmp_path: Path) -> None:
    data = file_with(entry(b"a", 9, struct.pack("<IQ", 8, 2**40)))
    tracemalloc.start()
    with pytest.raises(FileFormatError):
        read(data, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_metadata_of_the_size_of_a_model_is_refused(tmp_path: Path) -> None:
    """Bytes of the file become Python numbers of many times their size, so the file's size is no bound."""
    path = tmp_path / "large.gguf"
    path.write_bytes(file_with(entry(b"a", 9, struct.pack("<IQ", 0, 200_000_000))))
    with path.open("r+b") as file:
        file.truncate(300_000_000)  # a sparse file
    tracemalloc.start()
    with pytest.raises(FileFormatError, match="far too large") as caught:
        read_metadata(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.field == "a" and peak < 1_000_000


@pytest.mark.parametrize("cut", range(0, 700, 7))
def test_every_truncation_is_an_error(written: bytes, tmp_path: Path, cut: int) -> None:
    with pytest.raises(FileFormatError):
        read(written[: min(cut, len(written) - 1)], tmp_path)


@settings(max_examples=500, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 2**32), st.integers(0, 255)), min_size=1, max_size=8))
def test_any_mutation_is_read_or_refused(
    written: bytes, tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]]
) -> None:
    data = bytearray(written)
    for where, byte in edits:
        data[where % len(data)] = byte
    try:
        found = read(bytes(data), tmp_path_factory.getbasetemp())
    except FileFormatError as error:
        assert error.field is not None and error.offset is not None and error.offset <= len(data)
    else:
        assert found.tensor_info_offset <= len(data)
