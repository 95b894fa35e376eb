"""Damaged and malicious Meta checkpoints: nothing in a pickle is executed, and nothing is believed."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from herd import FileFormatError
from herd.architecture import LlamaConfig
from herd.checkpoint import open_checkpoint, save
from herd.checkpoint.torchpickle import PickledTensor, write_state_dict

Small = Callable[..., tuple[LlamaConfig, dict[str, np.ndarray]]]
Refused = Callable[..., FileFormatError]


@pytest.fixture
def meta(tmp_path: Path, small: Small) -> Path:
    config, weights = small("llama3")
    return save(tmp_path / "meta", config, weights, format="meta", shards=2)


def test_a_truncated_pth_file_is_refused_at_every_length(meta: Path, refused: Refused) -> None:
    file = meta / "consolidated.01.pth"
    whole = file.read_bytes()
    for length in [*range(0, len(whole), 613), len(whole) - 1, len(whole) - 22]:
        file.write_bytes(whole[:length])
        refused(meta, ".", file=file.name)


class _Evil:
    """Touches a file when it is unpickled by anything that executes pickles."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_malicious_pickle_is_refused_and_not_executed(
    meta: Path, tmp_path: Path, protocol: int, refused: Refused
) -> None:
    raw = pickle.dumps({"tok_embeddings.weight": _Evil(tmp_path / "owned")}, protocol=protocol)
    with zipfile.ZipFile(meta / "consolidated.00.pth", "w") as archive:
        archive.writestr("consolidated/data.pkl", raw)
    error = refused(
        meta, "not executed|no state dictionary needs", file="consolidated.00.pth", field="data.pkl", offset=True
    )
    assert not (tmp_path / "owned").exists()
    if protocol >= 2:
        assert error.value == "posix.mkdir"


PICKLES = {
    "a call of eval": (b"\x80\x02cbuiltins\neval\nX\x04\x00\x00\x001+11\x85R.", "not executed; got builtins.eval"),
    "attributes of torch": (b"\x80\x02ctorch\nload\n.", "not executed; got torch.load"),
    "getattr": (b"\x80\x02c__builtin__\ngetattr\n.", "not executed"),
    "a name with a path": (b"\x80\x04\x8c\x0ctorch._utils\x8c\x08os.popen\x93.", "not executed"),
    "persistent text ids": (b"\x80\x02Pfoo\n.", "instruction that no state dictionary needs"),
    "extension codes": (b"\x80\x02\x82\x01.", "instruction that no state dictionary needs"),
    "a list": (b"\x80\x02].", "does not hold a state dictionary"),
    "nothing": (b"\x80\x02N.", "does not hold a state dictionary"),
    "an empty stack": (b"\x80\x02.", "does not hold a state dictionary"),
    "a tensor of nothing": (b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n)Rs.", "malformed"),
    "an unknown storage": (b"\x80\x02(X\x01\0\0\0atQ.", "unknown kind of storage"),
    "a call of data": (b"\x80\x02}}R.", "not a constructor"),
    "an object of a class": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "makes an object"),
    "a missing mark": (b"\x80\x02t.", "malformed"),
    "an unset memo": (b"\x80\x02h\x07.", "malformed"),
    "eight terabytes of bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 43), "ends too early"),
    "a memo of four billion": (b"\x80\x02}r\xff\xff\xff\xff.", "embedding is missing"),  # costs nothing here
    "a key that is a number": (b"\x80\x02}K\x01K\x02s.", "not text"),
    "the same name twice": (b"\x80\x02}X\x01\0\0\0aNsX\x01\0\0\0aNs.", "occurs twice"),
    "items of a number": (b"\x80\x02K\x01(K\x01K\x02u.", "not a dictionary"),
    "no end": (b"\x80\x02}", "ends too early"),
    "two million instructions": (b"\x80\x02" + b"N0" * 1_000_001 + b"}.", "far more objects"),
}


@pytest.mark.parametrize("what", PICKLES)
def test_pickles_that_are_no_state_dictionary_are_refused(meta: Path, what: str, refused: Refused) -> None:
    raw, match = PICKLES[what]
    with zipfile.ZipFile(meta / "consolidated.00.pth", "w") as archive:
        archive.writestr("consolidated/data.pkl", raw)
    refused(meta, match, file="consolidated.00.pth")


def test_archives_that_are_no_checkpoint_are_refused(meta: Path, refused: Refused) -> None:
    file = meta / "consolidated.00.pth"

    def archive(records: dict[str, bytes], **options: Any) -> None:
        with zipfile.ZipFile(file, "w", **options) as out:
            for name, data in records.items():
                out.writestr(name, data)

    archive({"other": b""})
    refused(meta, "not a torch checkpoint", file=file.name)
    archive({"a/data.pkl": b"", "b/data.pkl": b""})
    refused(meta, "not a torch checkpoint", file=file.name)
    archive({"a/data.pkl": b"\x80\x02}."}, compression=zipfile.ZIP_DEFLATED)
    refused(meta, "stored plainly", file=file.name, field="a/data.pkl", offset=True)
    archive({"a/data.pkl": b"\x80\x02}.", "a/byteorder": b"big"})
    refused(meta, "little-endian", file=file.name, offset=True)
    archive({"a/data.pkl": b"\x80\x02}."})
    refused(meta, "embedding is missing", file=file.name, field="tok_embeddings.weight")
    file.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    refused(meta, "before version 1.6", file=file.name, offset=True)
    archive({"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(64)})
    raw = bytearray(file.read_bytes())
    entry = raw.index(b"PK\x01\x02")
    raw[entry + 20 : entry + 28] = struct.pack("<II", 60, 60)  # the pickle's size now covers the next record
    file.write_bytes(raw)
    refused(meta, "overlaps a/data.pkl", file=file.name, field="a/data/0", offset=True)
    archive({"a/data.pkl": b"\x80\x02}."})
    raw = bytearray(file.read_bytes())
    raw[30] ^= 1
    file.write_bytes(raw)
    refused(meta, "another name", file=file.name, field="a/data.pkl", offset=True)
    with pytest.warns(UserWarning), zipfile.ZipFile(file, "w") as out:
        out.writestr("a/data.pkl", b"\x80\x02}.")
        out.writestr("a/data.pkl", b"\x80\x02}.")
    refused(meta, "occurs twice", file=file.name, offset=True)


def test_views_beyond_their_storage_are_refused(meta: Path, refused: Refused) -> None:
    """A huge shape with stride 0 would make gigabytes out of two bytes."""
    for shape, stride, offset in (((1 << 40, 64), (0, 0), 0), ((64, 64), (64, 1), 1 << 50), ((65, 64), (64, 1), 0)):
        view = PickledTensor("0", "bf16", 4096, offset, shape, stride)
        with zipfile.ZipFile(meta / "consolidated.00.pth", "w") as archive:
            archive.writestr("a/data.pkl", write_state_dict([("tok_embeddings.weight", view)]))
            archive.writestr("a/data/0", bytes(8192))
        refused(meta, "beyond its storage", file="consolidated.00.pth", field="tok_embeddings.weight", offset=True)
    view = PickledTensor("7", "bf16", 4096, 0, (64, 64), (64, 1))
    with zipfile.ZipFile(meta / "consolidated.00.pth", "w") as archive:
        archive.writestr("a/data.pkl", write_state_dict([("tok_embeddings.weight", view)]))
    refused(meta, "storage is not in the file", file="consolidated.00.pth", field="tok_embeddings.weight")


def test_shards_must_be_complete_and_alike(meta: Path, small: Small, tmp_path: Path, refused: Refused) -> None:
    first, second = meta / "consolidated.00.pth", meta / "consolidated.01.pth"
    second.rename(meta / "consolidated.02.pth")
    refused(meta, "shard is missing", file="consolidated.01.pth")
    (meta / "consolidated.02.pth").unlink()
    refused(meta, "contradicts", file="params.json", field="vocab_size")  # half a model
    config, weights = small("llama3")
    from dataclasses import replace

    wide = save(tmp_path / "wide", replace(config, ffn_dim=192), _widened(weights), format="meta", shards=2)
    second.write_bytes((wide / "consolidated.01.pth").read_bytes())
    refused(meta, "contradicts the config", file=second.name, offset=True)
    first.unlink()
    refused(meta, "shard is missing", file=first.name)


def test_shards_of_different_number_formats_are_not_joined(meta: Path, small: Small, refused: Refused) -> None:
    """The second half in float32 would be rounded to the first half's bfloat16, without a word."""
    config, weights = small("llama3", "f32")
    wide = save(meta.parent / "wide", config, weights, format="meta", shards=2)
    (meta / "consolidated.01.pth").write_bytes((wide / "consolidated.01.pth").read_bytes())
    error = refused(meta, "different number formats", file="consolidated.01.pth", offset=True)
    assert error.value == "f32"


def test_weights_in_a_format_that_is_not_read_are_refused(meta: Path, refused: Refused) -> None:
    view = PickledTensor("0", "F64", 96 * 64, 0, (96, 64), (64, 1))
    with zipfile.ZipFile(meta / "consolidated.00.pth", "w") as archive:
        archive.writestr("a/data.pkl", write_state_dict([("tok_embeddings.weight", view), ("norm.weight", view)]))
        archive.writestr("a/data/0", bytes(96 * 64 * 8))
    (meta / "consolidated.01.pth").unlink()
    refused(meta, "does not read", file="consolidated.00.pth", field="tok_embeddings.weight", offset=True)


def _widened(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    axes = {"w1": 0, "w3": 0, "w2": 1}
    return {
        name: np.concatenate([a, a], axes[name.split(".")[-2]]) if ".ffn." in name else a for name, a in weights.items()
    }


@pytest.mark.parametrize(
    ("change", "match", "field"),
    [
        ({"dim": None}, "is missing", "dim"),
        ({"dim": 128}, "contradicts", None),
        ({"n_heads": 7}, "does not divide", "n_heads"),
        ({"n_layers": 3}, "missing", None),
        ({"n_layers": 10**11}, "more layers", "n_layers"),
        ({"vocab_size": 95}, "contradicts the embedding", "vocab_size"),
        ({"multiple_of": 1024}, "contradicts the config", None),
        ({"ffn_dim_multiplier": -1}, "above 0", "ffn_dim_multiplier"),
        ({"ffn_dim_multiplier": 1e308}, "above 0", "ffn_dim_multiplier"),
        ({"quantization_args": {"group_size": 256}}, "changes the architecture", "quantization_args"),
        ({"vision_num_cross_attention_layers": 8}, "changes the architecture", "vision_num_cross_attention_layers"),
        ({"moe_args": {"num_experts": 2, "top_k": 4}}, "more than there are experts", "moe_args.top_k"),
    ],
)
def test_params_that_contradict_are_refused(meta: Path, change: dict[str, Any], match: str, field: str | None) -> None:
    file = meta / "params.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(FileFormatError, match=match) as caught:
        open_checkpoint(meta)
    assert caught.value.file is not None
    assert field is None or caught.value.field == field
