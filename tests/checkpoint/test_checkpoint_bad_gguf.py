"""Damaged and malicious GGUF files: each is refused with an error that names file, field and offset."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from herd import FileFormatError
from herd.architecture import LlamaConfig
from herd.checkpoint import save

Small = Callable[..., tuple[LlamaConfig, dict[str, np.ndarray]]]
Refused = Callable[..., FileFormatError]


@pytest.fixture
def gguf_file(tmp_path: Path, small: Small) -> Path:
    config, weights = small("llama3.1")
    return save(tmp_path / "m.gguf", config, weights, format="gguf", dtype="q8_0")


def test_a_truncated_gguf_file_is_refused_at_every_length(gguf_file: Path, refused: Refused) -> None:
    whole = gguf_file.read_bytes()
    for length in [*range(0, 2000, 13), *range(2000, len(whole) - 40, 499)]:
        gguf_file.write_bytes(whole[:length])
        refused(gguf_file, ".", file=gguf_file.name, offset=True)


def _patched(path: Path, find: bytes, after: int, value: bytes) -> Path:
    """Overwrite bytes `after` the (only) place where `find` ends."""
    raw = bytearray(path.read_bytes())
    assert raw.count(find) == 1
    start = raw.index(find) + len(find) + after
    raw[start : start + len(value)] = value
    path.write_bytes(raw)
    return path


U64 = struct.Struct("<Q").pack
NAME = b"blk.1.attn_output.weight"  # then u32 n_dims, 2 × u64 size, u32 type, u64 offset


@pytest.mark.parametrize(
    ("after", "value", "match", "field"),
    [
        (0, struct.pack("<I", 5), "number of dimensions", NAME.decode()),
        (0, struct.pack("<I", 0), "number of dimensions", NAME.decode()),
        (4, U64(1 << 63), "whole blocks|outside the file|contradicts", NAME.decode()),
        (4, U64(33), "whole blocks", NAME.decode()),
        (4, U64(32), "contradicts the config", NAME.decode()),
        (12, U64(0), "is empty", NAME.decode()),
        (12, U64(1 << 62), "outside the file|overlaps", None),
        (20, struct.pack("<I", 12), "rows must be whole blocks", NAME.decode()),
        (20, struct.pack("<I", 15), "does not read; got Q8_K", NAME.decode()),
        (20, struct.pack("<I", 77), "does not read; got type 77", NAME.decode()),
        (24, U64(1 << 62), "outside the file", NAME.decode()),
        (24, U64(32), "overlaps", None),
        (24, U64(33), "not aligned", NAME.decode()),
    ],
)
def test_a_false_tensor_info_is_refused(
    gguf_file: Path, after: int, value: bytes, match: str, field: str | None, refused: Refused
) -> None:
    refused(_patched(gguf_file, NAME, after, value), match, file=gguf_file.name, field=field, offset=True)


def test_gguf_heads_that_cannot_be_true_are_refused(gguf_file: Path, refused: Refused) -> None:
    whole = gguf_file.read_bytes()
    for offset, value, match in (
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 9), "version"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, U64(1 << 60), "cannot be true"),
        (16, U64(1 << 60), "cannot be true"),
    ):
        gguf_file.write_bytes(whole[:offset] + value + whole[offset + len(value) :])
        refused(gguf_file, match, file=gguf_file.name, offset=True)
    gguf_file.write_bytes(whole)
    gguf_file.write_bytes(whole.replace(b"blk.1.attn_k.weight", b"blk.0.attn_k.weight"))
    refused(gguf_file, "occurs twice", file=gguf_file.name, field="blk.0.attn_k.weight", offset=True)
    gguf_file.write_bytes(whole.replace(b"blk.1.attn_k.weight", b"blk.1.attn_z.weight"))
    refused(gguf_file, "missing", file=gguf_file.name, field="blk.1.attn_k.weight")
    gguf_file.write_bytes(whole.replace(b"llama.rope.freq_base", b"llama.rope.freq_bass"))
    # The table of divisors fits no scaling of the default theta.
    refused(gguf_file, "frequency table", file=gguf_file.name, field="rope_freqs.weight")
    gguf_file.write_bytes(whole.replace(b"rope_freqs.weight", b"rope_wrong.weight"))
    refused(gguf_file, "rope_freqs.weight is missing", file=gguf_file.name, field="herd.config")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("general.architecture", "qwen3", "not a Llama"),
        ("general.alignment", 33, "power of two"),
        ("general.alignment", 1 << 30, "power of two"),
        ("llama.block_count", 1, "no part of this Llama"),
        ("llama.block_count", 1 << 31, "more layers than"),
        ("llama.embedding_length", 128, "contradicts"),
        ("llama.attention.head_count", 3, "n_heads|divisor|n_kv_heads"),
        ("llama.attention.head_count_kv", [2, 1], "whole number"),
        ("llama.attention.key_length", 32, "several widths"),
        ("llama.vocab_size", 97, "contradicts the embedding"),
        ("llama.expert_count", 8, "experts"),
        ("split.count", 3, "several files"),
        ("llama.context_length", "long", "whole number"),
        ("herd.config", "[]", "unknown contents"),
        ("herd.config", "{", "not valid JSON"),
        ("herd.config", '{"dim": 3}', "unknown contents"),
        ("herd.config", '{"generation": 3}', "generation"),
        ("herd.config", '{"generation": "llama3.1", "rope_scaling": {"kind": "llama3", "bad": 1}}', "unusable"),
        ("tokenizer.ggml.tokens", ["a", "b"], "vocabulary's size"),
    ],
)
def test_gguf_metadata_that_contradicts_is_refused(
    tmp_path: Path, small: Small, key: str, value: object, match: str, refused: Refused
) -> None:
    from herd.checkpoint.gguf import GgufFile, GgufWriter

    config, weights = small("llama3.1")
    save(tmp_path / "m.gguf", config, weights, format="gguf")
    file = GgufFile(tmp_path / "m.gguf")
    with open(tmp_path / "bad.gguf", "wb") as out:
        # Aligned as the default reader expects, whatever the key then says.
        writer = GgufWriter(
            out, file.metadata | ({} if key == "general.alignment" else {key: value}), list(file.tensors.values())
        )
        for name, tensor in file.tensors.items():
            writer.put(name, [file.rows(name, 0, tensor.rows)])
    if key == "general.alignment":
        raw = (tmp_path / "bad.gguf").read_bytes()
        entry = U64(len(key)) + key.encode() + struct.pack("<II", 4, value)
        (tmp_path / "bad.gguf").write_bytes(raw[:16] + U64(len(file.metadata) + 1) + entry + raw[24:])
    refused(tmp_path / "bad.gguf", match, file="bad.gguf")
