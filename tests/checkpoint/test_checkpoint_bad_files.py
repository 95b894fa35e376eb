"""Damaged and malicious files: each is refused with a FileFormatError that names file, field and (in binary) offset."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from herd import FileFormatError, HerdError
from herd.architecture import LlamaConfig
from herd.checkpoint import open_checkpoint, save

Small = Callable[..., tuple[LlamaConfig, dict[str, np.ndarray]]]


def _refused(path: Path, match: str, *, file: str, field: str | None = None, offset: bool = False) -> FileFormatError:
    with pytest.raises(FileFormatError, match=match) as caught, open_checkpoint(path) as checkpoint:
        for name in checkpoint:
            checkpoint[name]
    error = caught.value
    assert error.file is not None and Path(error.file).name == file
    if field is not None:
        assert error.field == field
    assert not offset or isinstance(error.offset, int)
    return error


# --- safetensors ------------------------------------------------------------------------------------------------------


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _write(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def hf(tmp_path: Path, small: Small) -> Path:
    config, weights = small("llama3")
    return save(tmp_path / "hf", config, weights)


def test_a_truncated_safetensors_file_is_refused_at_every_length(hf: Path) -> None:
    file = hf / "model.safetensors"
    whole = file.read_bytes()
    for length in [*range(0, 200, 7), *range(200, len(whole), 997), len(whole) - 1]:
        file.write_bytes(whole[:length])
        _refused(hf, ".", file=file.name, offset=length != 0)
    file.write_bytes(whole + b"\0")
    _refused(hf, "belong to nothing", file=file.name, field="data", offset=True)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "match", "field"),
    [
        (lambda h: h[NORM].update(data_offsets=[0, 128]), "overlaps|hole", None),
        (lambda h: h[NORM].update(data_offsets=[1 << 60, (1 << 60) + 128]), "outside the file", f"{NORM}.data_offsets"),
        (lambda h: h[NORM].update(data_offsets=[128, 0]), "outside the file", f"{NORM}.data_offsets"),
        (lambda h: h[NORM].update(data_offsets=[-128, 0]), "whole numbers", f"{NORM}.data_offsets"),
        (lambda h: h[NORM].update(data_offsets=[0.0, 128.0]), "whole numbers", f"{NORM}.data_offsets"),
        (lambda h: h[NORM].update(shape=[1 << 62, 1 << 62]), "do not fill", f"{NORM}.shape"),
        (lambda h: h[NORM].update(shape=[-64]), "whole numbers", f"{NORM}.shape"),
        (lambda h: h[NORM].update(shape=[True] * 64), "whole numbers", f"{NORM}.shape"),
        (lambda h: h[NORM].update(dtype="F4"), "unknown number format", f"{NORM}.dtype"),
        (lambda h: h[NORM].update(dtype=["BF16"]), "unknown number format", f"{NORM}.dtype"),
        (lambda h: h[NORM].update(dtype="I16"), "does not read", NORM),
        (lambda h: h[NORM].update(more=1), "exactly dtype", NORM),
        (lambda h: h.update({NORM: [1, 2]}), "exactly dtype", NORM),
        (lambda h: h.update(__metadata__={"format": 1}), "text to text", "__metadata__"),
        (lambda h: h.update({"model.layers.0.self_attn.q_proj.bias": h.pop(NORM)}), "missing", NORM),
    ],
)
def test_a_false_safetensors_header_is_refused(
    hf: Path, change: Callable[[dict[str, Any]], object], match: str, field: str | None
) -> None:
    file = hf / "model.safetensors"
    header, data = _header(file)
    change(header)
    _write(file, header, data)
    _refused(hf, match, file="hf" if match == "missing" else file.name, field=field)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"not json", "start with"),
        (b"[1]", "start with"),
        (b'{"a": ', "not valid JSON"),
        (b'{"a": NaN}', "not a JSON number"),
        (b'{"\xff": 1}', "UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Python refuses"),
        (b'{"t": 1, "t": 2}', "appears twice"),
    ],
)
def test_a_header_that_is_no_strict_json_is_refused(hf: Path, raw: bytes, match: str) -> None:
    _write(hf / "model.safetensors", raw, b"")
    _refused(hf, match, file="model.safetensors", offset=True)


def test_a_header_length_beyond_the_file_allocates_nothing(hf: Path) -> None:
    (hf / "model.safetensors").write_bytes((1 << 63).to_bytes(8, "little") + b"{}")
    _refused(hf, "cannot be that long", file="model.safetensors", field="header length", offset=True)


def test_extra_tensors_that_change_the_model_are_refused(tmp_path: Path, small: Small) -> None:
    config, weights = small("llama3")
    path = save(tmp_path / "hf", config, weights)
    header, data = _header(path / "model.safetensors")
    header["model.layers.0.self_attn.q_proj.bias"] = {
        "dtype": "BF16", "shape": [64], "data_offsets": [len(data), len(data) + 128],
    }  # fmt: skip
    _write(path / "model.safetensors", header, data + bytes(128))
    _refused(path, "no part of this Llama", file="hf", field="model.layers.0.self_attn.q_proj.bias", offset=True)
    header["model.layers.0.self_attn.rotary_emb.inv_freq"] = header.pop("model.layers.0.self_attn.q_proj.bias")
    _write(path / "model.safetensors", header, data + bytes(128))
    with open_checkpoint(path) as checkpoint:  # a table that the config determines is fine
        assert len(checkpoint.skipped) == 1


# --- the index of a sharded checkpoint --------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path, small: Small) -> Path:
    config, weights = small("llama3")
    return save(tmp_path / "hf", config, weights, max_shard_bytes=40_000)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "a\\b.safetensors", "x\0.safetensors",
     "model.bin", "", 7, None, ".hidden.safetensors", "a..safetensors"],
)  # fmt: skip
def test_an_index_cannot_reach_outside_its_directory(sharded: Path, name: object) -> None:
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "secret.safetensors")
    data["weight_map"][NORM] = name
    index.write_text(json.dumps(data))
    _refused(sharded, "beside the index", file=index.name, field=f"weight_map.{NORM}")


def test_an_index_must_agree_with_its_files(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    files = sorted(set(whole["weight_map"].values()))
    assert len(files) > 2

    def written(change: Callable[[dict[str, Any]], object]) -> Path:
        data = json.loads(json.dumps(whole))
        change(data)
        index.write_text(json.dumps(data))
        return sharded

    _refused(written(lambda d: d["weight_map"].pop(NORM)), "not in the index", file=index.name, field=NORM)
    _refused(written(lambda d: d["weight_map"].update(ghost=files[0])), "not in the file", file=files[0], field="ghost")
    _refused(written(lambda d: d["weight_map"].update({NORM: files[0]})), "not in the", file=index.name, field=NORM)
    _refused(
        written(lambda d: d["weight_map"].update(ghost="gone.safetensors")), "no such file", file="gone.safetensors"
    )
    _refused(written(lambda d: d.pop("weight_map")), "must map", file=index.name, field="weight_map")
    copy = sharded / "copy.safetensors"
    copy.write_bytes((sharded / files[0]).read_bytes())
    first = next(name for name, file in whole["weight_map"].items() if file == files[0])
    with pytest.raises(FileFormatError, match=r"not in the|is also in"):
        open_checkpoint(written(lambda d: d["weight_map"].update({first: "copy.safetensors"})))
    copy.unlink()
    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    _refused(sharded, "appears twice", file=index.name, field="a")
    index.write_text("[]")
    _refused(sharded, "JSON object", file=index.name)


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match", "field"),
    [
        ({"model_type": "mistral"}, "not a Llama", "model_type"),
        ({"model_type": None}, "not a Llama", "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "language model", "architectures"),
        ({"auto_map": {"AutoModel": "evil.py"}}, "never runs", "auto_map"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised", "quantization_config"),
        ({"hidden_act": "gelu"}, "changes the architecture", "hidden_act"),
        ({"attention_bias": True}, "changes the architecture", "attention_bias"),
        ({"mlp_bias": True}, "changes the architecture", "mlp_bias"),
        ({"sliding_window": 4096}, "changes the architecture", "sliding_window"),
        ({"hidden_size": None}, "is missing", "hidden_size"),
        ({"hidden_size": "64"}, "whole number", "hidden_size"),
        ({"hidden_size": 1 << 60}, "whole number", "hidden_size"),
        ({"num_hidden_layers": 1 << 39}, "more layers than", "n_layers"),
        ({"num_hidden_layers": 1}, "no part of this Llama", None),
        ({"num_hidden_layers": 3}, "missing", None),
        ({"vocab_size": 97}, "contradicts the config", "model.embed_tokens.weight"),
        ({"intermediate_size": 128}, "contradicts the config", "model.layers.0.mlp.gate_proj.weight"),
        ({"num_key_value_heads": 4}, "contradicts the config", "model.layers.0.self_attn.k_proj.weight"),
        ({"num_key_value_heads": 3}, "n_kv_heads", None),
        ({"head_dim": 15}, "head_dim", None),
        ({"head_dim": None, "num_attention_heads": 7}, "does not divide", "num_attention_heads"),
        ({"tie_word_embeddings": "yes"}, "true or false", "tie_word_embeddings"),
        ({"rms_norm_eps": -1e-5}, "above 0", "rms_norm_eps"),
        ({"rope_theta": 1e4}, "contradicts rope_parameters", "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "contradicts rope_parameters", "rope_scaling"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "not known", "rope_parameters.rope_type"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "is missing", "rope_parameters.low_freq_factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "not valid", "rope_parameters.factor"),
        ({"rope_parameters": [1]}, "must be an object", "rope_parameters"),
        ({"herd": {"generation": "llama9"}}, "not known", "herd.generation"),
    ],
)
def test_a_config_that_is_no_llama_or_contradicts_the_tensors_is_refused(
    hf: Path, change: dict[str, Any], match: str, field: str | None
) -> None:
    file = hf / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    error = _refused(
        hf,
        match,
        file="hf" if match in ("missing", "contradicts the config", "no part of this Llama") else "config.json",
    )
    assert field is None or error.field == field


def test_a_missing_output_head_is_noticed(tmp_path: Path, small: Small) -> None:
    config, weights = small("llama3.2")
    path = save(tmp_path / "hf", config, weights)
    file = path / "config.json"
    file.write_text(file.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    _refused(path, "missing", file="hf", field="lm_head.weight")


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gguf_file(tmp_path: Path, small: Small) -> Path:
    config, weights = small("llama3.1")
    return save(tmp_path / "m.gguf", config, weights, format="gguf", dtype="q8_0")


def test_a_truncated_gguf_file_is_refused_at_every_length(gguf_file: Path) -> None:
    whole = gguf_file.read_bytes()
    for length in [*range(0, 2000, 13), *range(2000, len(whole) - 40, 499)]:
        gguf_file.write_bytes(whole[:length])
        _refused(gguf_file, ".", file=gguf_file.name, offset=True)


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
        (20, struct.pack("<I", 12), "does not read; got Q4_K", NAME.decode()),
        (20, struct.pack("<I", 77), "does not read; got type 77", NAME.decode()),
        (24, U64(1 << 62), "outside the file", NAME.decode()),
        (24, U64(32), "overlaps", None),
        (24, U64(33), "not aligned", NAME.decode()),
    ],
)
def test_a_false_tensor_info_is_refused(
    gguf_file: Path, after: int, value: bytes, match: str, field: str | None
) -> None:
    _refused(_patched(gguf_file, NAME, after, value), match, file=gguf_file.name, field=field, offset=True)


def test_gguf_heads_that_cannot_be_true_are_refused(gguf_file: Path) -> None:
    whole = gguf_file.read_bytes()
    for offset, value, match in (
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 9), "version"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, U64(1 << 60), "cannot be true"),
        (16, U64(1 << 60), "cannot be true"),
    ):
        gguf_file.write_bytes(whole[:offset] + value + whole[offset + len(value) :])
        _refused(gguf_file, match, file=gguf_file.name, offset=True)
    gguf_file.write_bytes(whole)
    gguf_file.write_bytes(whole.replace(b"blk.1.attn_k.weight", b"blk.0.attn_k.weight"))
    _refused(gguf_file, "occurs twice", file=gguf_file.name, field="blk.0.attn_k.weight", offset=True)
    gguf_file.write_bytes(whole.replace(b"blk.1.attn_k.weight", b"blk.1.attn_z.weight"))
    _refused(gguf_file, "missing", file=gguf_file.name, field="blk.1.attn_k.weight")
    gguf_file.write_bytes(whole.replace(b"llama.rope.freq_base", b"llama.rope.freq_bass"))
    # The table of divisors fits no scaling of the default theta.
    _refused(gguf_file, "frequency table", file=gguf_file.name, field="rope_freqs.weight")
    gguf_file.write_bytes(whole.replace(b"rope_freqs.weight", b"rope_wrong.weight"))
    _refused(gguf_file, "rope_freqs.weight is missing", file=gguf_file.name, field="herd.config")


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
    tmp_path: Path, small: Small, key: str, value: object, match: str
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
    _refused(tmp_path / "bad.gguf", match, file="bad.gguf")


# --- Meta -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def meta(tmp_path: Path, small: Small) -> Path:
    config, weights = small("llama3")
    return save(tmp_path / "meta", config, weights, format="meta", shards=2)


def test_a_truncated_pth_file_is_refused_at_every_length(meta: Path) -> None:
    file = meta / "consolidated.01.pth"
    whole = file.read_bytes()
    for length in [*range(0, len(whole), 613), len(whole) - 1, len(whole) - 22]:
        file.write_bytes(whole[:length])
        _refused(meta, ".", file=file.name)


class _Evil:
    """Touches a file when it is unpickled by anything that executes pickles."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_malicious_pickle_is_refused_and_not_executed(meta: Path, tmp_path: Path, protocol: int) -> None:
    raw = pickle.dumps({"tok_embeddings.weight": _Evil(tmp_path / "owned")}, protocol=protocol)
    with zipfile.ZipFile(meta / "consolidated.00.pth", "w") as archive:
        archive.writestr("consolidated/data.pkl", raw)
    error = _refused(
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
    "eight terabytes of bytes": (b"\x80\x04\x8e" + U64(1 << 43), "ends too early"),
    "a memo of four billion": (b"\x80\x02}r\xff\xff\xff\xff.", "embedding is missing"),  # costs nothing here
    "a key that is a number": (b"\x80\x02}K\x01K\x02s.", "not text"),
    "the same name twice": (b"\x80\x02}X\x01\0\0\0aNsX\x01\0\0\0aNs.", "occurs twice"),
    "items of a number": (b"\x80\x02K\x01(K\x01K\x02u.", "not a dictionary"),
    "no end": (b"\x80\x02}", "ends too early"),
    "two million instructions": (b"\x80\x02" + b"N0" * 1_000_001 + b"}.", "far more objects"),
}


@pytest.mark.parametrize("what", PICKLES)
def test_pickles_that_are_no_state_dictionary_are_refused(meta: Path, what: str) -> None:
    raw, match = PICKLES[what]
    with zipfile.ZipFile(meta / "consolidated.00.pth", "w") as archive:
        archive.writestr("consolidated/data.pkl", raw)
    _refused(meta, match, file="consolidated.00.pth")


def test_archives_that_are_no_checkpoint_are_refused(meta: Path) -> None:
    file = meta / "consolidated.00.pth"

    def archive(records: dict[str, bytes], **options: Any) -> None:
        with zipfile.ZipFile(file, "w", **options) as out:
            for name, data in records.items():
                out.writestr(name, data)

    archive({"other": b""})
    _refused(meta, "not a torch checkpoint", file=file.name)
    archive({"a/data.pkl": b"", "b/data.pkl": b""})
    _refused(meta, "not a torch checkpoint", file=file.name)
    archive({"a/data.pkl": b"\x80\x02}."}, compression=zipfile.ZIP_DEFLATED)
    _refused(meta, "stored plainly", file=file.name, field="a/data.pkl", offset=True)
    archive({"a/data.pkl": b"\x80\x02}.", "a/byteorder": b"big"})
    _refused(meta, "little-endian", file=file.name, offset=True)
    archive({"a/data.pkl": b"\x80\x02}."})
    _refused(meta, "embedding is missing", file=file.name, field="tok_embeddings.weight")
    file.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    _refused(meta, "before version 1.6", file=file.name, offset=True)
    archive({"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(64)})
    raw = bytearray(file.read_bytes())
    entry = raw.index(b"PK\x01\x02")
    raw[entry + 20 : entry + 28] = struct.pack("<II", 60, 60)  # the pickle's size now covers the next record
    file.write_bytes(raw)
    _refused(meta, "overlaps a/data.pkl", file=file.name, field="a/data/0", offset=True)
    archive({"a/data.pkl": b"\x80\x02}."})
    raw = bytearray(file.read_bytes())
    raw[30] ^= 1
    file.write_bytes(raw)
    _refused(meta, "another name", file=file.name, field="a/data.pkl", offset=True)
    with pytest.warns(UserWarning), zipfile.ZipFile(file, "w") as out:
        out.writestr("a/data.pkl", b"\x80\x02}.")
        out.writestr("a/data.pkl", b"\x80\x02}.")
    _refused(meta, "occurs twice", file=file.name, offset=True)


def test_views_beyond_their_storage_are_refused(meta: Path) -> None:
    """A huge shape with stride 0 would make gigabytes out of two bytes."""
    from herd.checkpoint.torchpickle import PickledTensor, write_state_dict

    for shape, stride, offset in (((1 << 40, 64), (0, 0), 0), ((64, 64), (64, 1), 1 << 50), ((65, 64), (64, 1), 0)):
        view = PickledTensor("0", "bf16", 4096, offset, shape, stride)
        with zipfile.ZipFile(meta / "consolidated.00.pth", "w") as archive:
            archive.writestr("a/data.pkl", write_state_dict([("tok_embeddings.weight", view)]))
            archive.writestr("a/data/0", bytes(8192))
        _refused(meta, "beyond its storage", file="consolidated.00.pth", field="tok_embeddings.weight", offset=True)
    view = PickledTensor("7", "bf16", 4096, 0, (64, 64), (64, 1))
    with zipfile.ZipFile(meta / "consolidated.00.pth", "w") as archive:
        archive.writestr("a/data.pkl", write_state_dict([("tok_embeddings.weight", view)]))
    _refused(meta, "storage is not in the file", file="consolidated.00.pth", field="tok_embeddings.weight")


def test_shards_must_be_complete_and_alike(meta: Path, small: Small, tmp_path: Path) -> None:
    first, second = meta / "consolidated.00.pth", meta / "consolidated.01.pth"
    second.rename(meta / "consolidated.02.pth")
    _refused(meta, "shard is missing", file="consolidated.01.pth")
    (meta / "consolidated.02.pth").unlink()
    _refused(meta, "contradicts", file="params.json", field="vocab_size")  # half a model
    config, weights = small("llama3")
    from dataclasses import replace

    wide = save(tmp_path / "wide", replace(config, ffn_dim=192), _widened(weights), format="meta", shards=2)
    second.write_bytes((wide / "consolidated.01.pth").read_bytes())
    _refused(meta, "contradicts the config", file=second.name, offset=True)
    first.unlink()
    _refused(meta, "shard is missing", file=first.name)


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


# --- places that hold no model ----------------------------------------------------------------------------------------


def test_places_without_a_model_say_what_is_expected(tmp_path: Path, hf: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileFormatError, match="no model is in this directory"):
        open_checkpoint(empty)
    (empty / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileFormatError, match="safetensors"):
        open_checkpoint(empty)
    (empty / "pytorch_model.bin").unlink()
    (empty / "checkpoint").mkdir()
    with pytest.raises(FileFormatError, match=r"to fix: use .*empty/checkpoint"):
        open_checkpoint(empty)
    (hf / "config.json").rename(empty / "config.json")
    _refused(hf, "no such file", file="config.json")
    with pytest.raises(HerdError, match="not a GGUF file"):
        open_checkpoint(empty / "config.json")
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(FileFormatError, match="regular file"):  # and does not wait for a writer
        open_checkpoint(tmp_path / "pipe.gguf")
    for name in ("a.gguf", "b.gguf"):
        (empty / name).write_bytes(b"GGUF")
    with pytest.raises(HerdError, match=r"several GGUF files.*a\.gguf, b\.gguf"):
        open_checkpoint(empty)


def test_a_file_that_shrinks_while_it_is_open_is_an_error(hf: Path) -> None:
    with open_checkpoint(hf) as checkpoint:
        os.truncate(hf / "model.safetensors", 5000)
        with pytest.raises(FileFormatError, match="shorter while it was read"):
            checkpoint["output.weight"]
