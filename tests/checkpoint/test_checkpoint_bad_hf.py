"""Damaged and malicious Hugging Face directories: each is refused with file, field and (in binary) offset."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from herd import FileFormatError
from herd.architecture import LlamaConfig
from herd.checkpoint import open_checkpoint, save

Small = Callable[..., tuple[LlamaConfig, dict[str, np.ndarray]]]
Refused = Callable[..., FileFormatError]

# --- safetensors ------------------------------------------------------------------------------------------------------


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _write(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_truncated_safetensors_file_is_refused_at_every_length(hf: Path, refused: Refused) -> None:
    file = hf / "model.safetensors"
    whole = file.read_bytes()
    for length in [*range(0, 200, 7), *range(200, len(whole), 997), len(whole) - 1]:
        file.write_bytes(whole[:length])
        refused(hf, ".", file=file.name, offset=length != 0)
    file.write_bytes(whole + b"\0")
    refused(hf, "belong to nothing", file=file.name, field="data", offset=True)


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
        (lambda h: h[NORM].update(shape=[64] + [1] * 8), "up to eight", f"{NORM}.shape"),
        (lambda h: h[NORM].update(data_offsets=[10**99, 10**99]), "outside the file", f"{NORM}.data_offsets"),
        (lambda h: h[NORM].update(more=1), "exactly dtype", NORM),
        (lambda h: h.update({NORM: [1, 2]}), "exactly dtype", NORM),
        (lambda h: h.update(__metadata__={"format": 1}), "text to text", "__metadata__"),
        (lambda h: h.update({"model.layers.0.self_attn.q_proj.bias": h.pop(NORM)}), "missing", NORM),
    ],
)
def test_a_false_safetensors_header_is_refused(
    hf: Path, change: Callable[[dict[str, Any]], object], match: str, field: str | None, refused: Refused
) -> None:
    file = hf / "model.safetensors"
    header, data = _header(file)
    change(header)
    _write(file, header, data)
    refused(hf, match, file="hf" if match == "missing" else file.name, field=field)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"not json", "start with"),
        (b"[1]", "start with"),
        (b'{"a": ', "not valid JSON"),
        (b'{"a": NaN}', "not a JSON number"),
        (b'{"\xff": 1}', "UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "endless number"),
        (b'{"a": ' + b"9" * 101 + b"}", "endless number"),
        (b'{"t": 1, "t": 2}', "appears twice"),
    ],
)
def test_a_header_that_is_no_strict_json_is_refused(hf: Path, raw: bytes, match: str, refused: Refused) -> None:
    _write(hf / "model.safetensors", raw, b"")
    refused(hf, match, file="model.safetensors", offset=True)


def test_a_header_length_beyond_the_file_allocates_nothing(hf: Path, refused: Refused) -> None:
    (hf / "model.safetensors").write_bytes((1 << 63).to_bytes(8, "little") + b"{}")
    refused(hf, "cannot be that long", file="model.safetensors", field="header length", offset=True)


def test_extra_tensors_that_change_the_model_are_refused(tmp_path: Path, small: Small, refused: Refused) -> None:
    config, weights = small("llama3")
    path = save(tmp_path / "hf", config, weights)
    header, data = _header(path / "model.safetensors")
    header["model.layers.0.self_attn.q_proj.bias"] = {
        "dtype": "BF16", "shape": [64], "data_offsets": [len(data), len(data) + 128],
    }  # fmt: skip
    _write(path / "model.safetensors", header, data + bytes(128))
    name = "model.layers.0.self_attn.q_proj.bias"
    refused(path, "no part of this Llama", file="model.safetensors", field=name, offset=True)
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
def test_an_index_cannot_reach_outside_its_directory(sharded: Path, name: object, refused: Refused) -> None:
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "secret.safetensors")
    data["weight_map"][NORM] = name
    index.write_text(json.dumps(data))
    refused(sharded, "beside the index", file=index.name, field=f"weight_map.{NORM}")


def test_an_index_must_agree_with_its_files(sharded: Path, refused: Refused) -> None:
    index = sharded / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    files = sorted(set(whole["weight_map"].values()))
    assert len(files) > 2

    def written(change: Callable[[dict[str, Any]], object]) -> Path:
        data = json.loads(json.dumps(whole))
        change(data)
        index.write_text(json.dumps(data))
        return sharded

    refused(written(lambda d: d["weight_map"].pop(NORM)), "not in the index", file=index.name, field=NORM)
    refused(written(lambda d: d["weight_map"].update(ghost=files[0])), "not in the file", file=files[0], field="ghost")
    refused(written(lambda d: d["weight_map"].update({NORM: files[0]})), "not in the", file=index.name, field=NORM)
    refused(
        written(lambda d: d["weight_map"].update(ghost="gone.safetensors")), "no such file", file="gone.safetensors"
    )
    refused(written(lambda d: d.pop("weight_map")), "must map", file=index.name, field="weight_map")
    copy = sharded / "copy.safetensors"
    copy.write_bytes((sharded / files[0]).read_bytes())
    first = next(name for name, file in whole["weight_map"].items() if file == files[0])
    with pytest.raises(FileFormatError, match=r"not in the|is also in"):
        open_checkpoint(written(lambda d: d["weight_map"].update({first: "copy.safetensors"})))
    copy.unlink()
    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    refused(sharded, "appears twice", file=index.name, field="a")
    index.write_text("[]")
    refused(sharded, "JSON object", file=index.name)


def test_weights_in_a_format_that_is_not_read_are_refused_when_opening(hf: Path) -> None:
    file = hf / "model.safetensors"
    header, data = _header(file)
    header[NORM]["dtype"] = "I16"
    _write(file, header, data)
    with pytest.raises(FileFormatError, match="does not read; got I16; allowed: f32, f16, bf16"):
        open_checkpoint(hf)


def test_an_error_names_the_one_file_of_several(sharded: Path, refused: Refused) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    name = "model.layers.0.mlp.gate_proj.weight"
    refused(sharded, "contradicts the config", file=index["weight_map"][name], field=name, offset=True)


# --- config.json ------------------------------------------------------------------------------------------------------


ROPE: dict[str, Any] = {"rope_parameters": None, "rope_scaling": None}


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
        ({"rms_norm_eps": 10**99}, "above 0", "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "endless number", None),
        ({"rope_theta": 1e4}, "contradicts rope_parameters", "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "contradicts rope_parameters", "rope_scaling"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "not known", "rope_parameters.rope_type"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "is missing", "rope_parameters.low_freq_factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "not valid", "rope_parameters.factor"),
        ({"rope_parameters": [1]}, "must be an object", "rope_parameters"),
        (ROPE | {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_theta", None),
        (ROPE | {"rope_theta": 1e-300}, "rope_theta", None),
        (ROPE | {"rope_theta": 1e29}, "rope_theta", None),
        (ROPE | {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 1e29}}, "not valid", None),
        ({"herd": {"generation": "llama9"}}, "not known", "herd.generation"),
    ],
)
def test_a_config_that_is_no_llama_or_contradicts_the_tensors_is_refused(
    hf: Path, change: dict[str, Any], match: str, field: str | None, refused: Refused
) -> None:
    file = hf / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    tensors = match in ("contradicts the config", "no part of this Llama")
    error = refused(hf, match, file="hf" if match == "missing" else "model.safetensors" if tensors else "config.json")
    assert field is None or error.field == field


def test_a_missing_output_head_is_noticed(tmp_path: Path, small: Small, refused: Refused) -> None:
    config, weights = small("llama3.2")
    path = save(tmp_path / "hf", config, weights)
    file = path / "config.json"
    file.write_text(file.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    refused(path, "missing", file="hf", field="lm_head.weight")


@pytest.mark.parametrize(
    ("name", "value"),
    [("layer_types", ["full_attention"]), ("moe_layers", [0]), ("moe_layers", 5), ("no_rope_layers", [1, 1])],
)
def test_a_trillion_layers_in_a_config_cost_nothing(
    tmp_path: Path, small: Small, name: str, value: object, refused: Refused
) -> None:
    """Lists of one item per layer are compared by length before any of that length is made."""
    config, weights = small("llama4-scout")
    file = save(tmp_path / "hf", config, weights) / "config.json"
    lists: dict[str, Any] = {"layer_types": None, "moe_layers": None, "no_rope_layers": None}
    data = json.loads(file.read_text()) | lists | {"num_hidden_layers": 1 << 39, name: value}
    file.write_text(json.dumps(data))
    refused(tmp_path / "hf", "one item per layer|contradicts", file="config.json", field=name)
