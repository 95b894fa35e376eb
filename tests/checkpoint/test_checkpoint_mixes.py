"""Quantised files: which tensor gets which format, what the gguf package makes of them, and `herd quantize`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import gguf
import numpy as np
import pytest

from herd import HerdError, tokenizer
from herd.architecture import LlamaConfig, tensor_shapes
from herd.checkpoint import blocks, open_checkpoint, save
from herd.checkpoint.mixes import MIXES, weighs_errors

pytestmark = pytest.mark.skipif(blocks._native is None, reason="Herd was installed without a compiler")

CONFIG = LlamaConfig(
    dim=256, n_layers=8, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=512, vocab_size=300, context_length=128
)


def weights(config: LlamaConfig = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * 0.05).astype(np.float32)
        for name, shape in tensor_shapes(config).items()
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = tokenizer.train(
        ["def f(x):\n    return x + 1\n", "some words about nothing in particular"], 300, n_specials=16
    )
    assert words.vocab_size <= CONFIG.vocab_size
    return save(tmp_path_factory.mktemp("models") / "m", CONFIG, weights(), tokenizer=words)


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_is_read_back_and_by_the_gguf_package(mix: str, tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", CONFIG, weights(), format="gguf", dtype=mix)
    assert gguf.GGUFReader(path).get_field("general.file_type").contents() == MIXES[mix].file_type
    expected = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    with open_checkpoint(path) as checkpoint:
        for canonical, stored in (
            ("layers.3.ffn.w2.weight", "blk.3.ffn_down.weight"),
            ("embed.weight", "token_embd.weight"),
        ):
            np.testing.assert_array_equal(checkpoint[canonical], expected[stored].reshape(checkpoint.shape(canonical)))
        for name, original in weights().items():
            error = np.sqrt(np.mean((checkpoint[name] - original) ** 2) / np.mean(original**2))
            assert error < 0.3, name


def test_a_mix_spends_its_bits_where_errors_cost_most(tmp_path: Path) -> None:
    found = types(save(tmp_path / "m.gguf", CONFIG, weights(), format="gguf", dtype="q4_k_m"))
    assert found["output.weight"] == "q6_k" and found["token_embd.weight"] == "q4_k"
    assert [found[f"blk.{i}.ffn_down.weight"] for i in range(8)] == [
        "q6_k" if i in (0, 3, 6, 7) else "q4_k" for i in range(8)
    ]
    assert all(found[f"blk.{i}.attn_v.weight"] == found[f"blk.{i}.ffn_down.weight"] for i in range(8))
    assert {
        found[f"blk.{i}.{name}.weight"] for i in range(8) for name in ("attn_q", "attn_k", "ffn_gate", "ffn_up")
    } == {"q4_k"}
    assert found["blk.0.attn_norm.weight"] == "f32"
    tied = LlamaConfig.from_dict(CONFIG.to_dict() | {"tied_embeddings": True})
    assert (
        types(save(tmp_path / "t.gguf", tied, weights(tied), format="gguf", dtype="q4_k_s"))["token_embd.weight"]
        == "q6_k"
    )


def rounded(weights: np.ndarray, group: int, levels: float, low: int, high: int) -> np.ndarray:
    """Symmetric rounding with a float16 scale for each group of a row, one group at a time."""
    out = np.empty_like(weights)
    for row, to in zip(weights, out, strict=True):
        for start in range(0, len(row), group):
            part = row[start : start + group]
            scale = np.float32(np.float16(np.abs(part).max() / np.float32(levels)))
            to[start : start + group] = np.clip(np.round(part / scale), low, high) * scale if scale else 0
    return out


def test_the_scheme_of_llama_3_2(tmp_path: Path) -> None:
    """4 bits in groups of 32; embedding and head in 8 bits with a scale a row; activations with a scale a token."""
    original = weights()
    original["layers.0.ffn.w1.weight"][3] = 0
    path = save(tmp_path / "m.gguf", CONFIG, original, format="gguf", dtype="int4_g32")
    assert gguf.GGUFReader(path).get_field("herd.activations").contents() == "token"
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.activations == "token"
        for name, array in original.items():
            if array.ndim == 1:
                continue
            whole = name in ("embed.weight", "output.weight")
            assert checkpoint.type_name(name) == ("q8_0" if whole else "q4_0")
            how = (array.shape[1], 127.5, -128, 127) if whole else (32, 7.5, -8, 7)
            np.testing.assert_array_equal(checkpoint[name], rounded(array, *how))


def test_the_scheme_of_llama_4(tmp_path: Path) -> None:
    """4 bits in groups of 128 for the experts; everything else stays in bfloat16."""
    config = LlamaConfig.from_dict(
        CONFIG.to_dict() | {"generation": "llama4", "moe": {"n_experts": 4, "ffn_dim": 160, "top_k": 1}, "n_layers": 2}
    )
    original = weights(config)
    with open_checkpoint(save(tmp_path / "m.gguf", config, original, format="gguf", dtype="int4_g128")) as checkpoint:
        assert checkpoint.activations == "block"
        for name, array in original.items():
            if array.ndim == 1 or "router" in name:
                continue
            if ".moe." not in name:
                assert checkpoint.type_name(name) == "bf16", name
                continue
            assert checkpoint.type_name(name) == "q4_0", name
            expected = rounded(array.reshape(-1, array.shape[-1]), 128, 8.0, -8, 7)  # of 160 columns: 128 and 32
            np.testing.assert_array_equal(checkpoint[name], expected.reshape(array.shape))
    dense = types(save(tmp_path / "d.gguf", CONFIG, weights(), format="gguf", dtype="int4_g128"))
    assert dense["blk.1.attn_q.weight"] == "q4_0" and dense["output.weight"] == "bf16"


def test_rows_that_do_not_fill_blocks_take_the_nearest_format(tmp_path: Path) -> None:
    narrow = LlamaConfig.from_dict(
        CONFIG.to_dict() | {"dim": 96, "n_heads": 2, "n_kv_heads": 1, "head_dim": 48, "ffn_dim": 80}
    )
    for mix, base, output in (("q4_k_m", "q5_0", "q8_0"), ("q2_k", "iq4_nl", "q8_0"), ("q5_k_m", "q5_1", "q8_0")):
        found = types(save(tmp_path / f"{mix}.gguf", narrow, weights(narrow), format="gguf", dtype=mix))
        assert (found["blk.1.attn_q.weight"], found["output.weight"]) == (base, output)
        assert found["blk.1.ffn_down.weight"] == "f16"  # rows of 80


def test_the_recipe_knows_every_mix() -> None:
    pytest.importorskip("torch")
    from herd.recipe.quantise import Format

    assert set(get_args(Format)) == {*MIXES, "f32", "bf16", "f16"}


Command = Callable[..., tuple[int, str, str]]


def test_the_verb(model: Path, tmp_path: Path, herd_command: Command) -> None:
    code, out, err = herd_command("quantize", model, tmp_path / "m.gguf")
    assert (code, err) == (0, "") and "q4_k_m" in out and "bits per weight" in out
    code, _, err = herd_command("quantize", model, tmp_path / "m.gguf")
    assert code == 2 and "--force" in err
    code, _, err = herd_command("quantize", model, tmp_path / "n.gguf", "--type", "q4_km")
    assert code == 2 and "did you mean 'q4_k_m'?" in err and not (tmp_path / "n.gguf").exists()
    code, out, _ = herd_command("quantize", model, tmp_path / "m.gguf", "--type", "q8_0", "--force", "--json")
    data = json.loads(out)
    assert data["type"] == "q8_0" and 8.5 <= data["bits_per_weight"] < 8.7
    assert data["formats"]["q8_0"]["tensors"] == 7 * 8 + 2


def test_importance_lowers_the_error_where_it_counts(model: Path, tmp_path: Path, herd_command: Command) -> None:
    torch = pytest.importorskip("torch")
    from herd.model import input_squares, load

    text = tmp_path / "calibration.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 30)
    for name, more in (("plain", []), ("weighed", ["--imatrix", text])):
        code, _, err = herd_command("quantize", model, tmp_path / f"{name}.gguf", "--type", "q4_k_m", *more)
        assert (code, err) == (0, "")
    with open_checkpoint(model) as original:
        ids = original.tokenizer.encode(text.read_text())
        squares = input_squares(load(model, dtype=torch.float32), [ids[:100]])
        assert set(squares) == {name for name in original if len(original.shape(name)) == 2 and name != "embed.weight"}
        sums = {}
        for name in ("plain", "weighed"):
            with open_checkpoint(tmp_path / f"{name}.gguf") as quantised:
                sums[name] = sum(
                    float((squares[matrix] * (quantised[matrix] - original[matrix]) ** 2).sum()) for matrix in squares
                )
    assert sums["weighed"] < 0.98 * sums["plain"]  # random weights: every input is of like importance


def test_each_expert_has_importance_of_its_own(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from herd.model import from_arrays, input_squares

    config = LlamaConfig.from_dict(
        CONFIG.to_dict() | {"generation": "llama4", "moe": {"n_experts": 3, "ffn_dim": 256, "top_k": 2}, "n_layers": 1}
    )
    original = weights(config)
    model = from_arrays(config, original).eval()
    ids = np.random.default_rng(1).integers(0, config.vocab_size, 60).tolist()
    found = input_squares(model, [ids])
    assert set(found) == {name for name, array in original.items() if array.ndim > 1 and name != "embed.weight"}
    # By hand: what the router sends to each expert, scaled by its score.
    with torch.no_grad():
        seen: list[torch.Tensor] = []
        hook = model.layers[0].moe.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
        model(torch.tensor([ids]))
        hook.remove()
        chosen, scores = model.layers[0].moe.router(seen[0]).topk(2)[::-1], None
        expected = torch.zeros(3, config.dim)
        for e in range(3):
            for t in range(len(ids)):
                if e in chosen[0][t].tolist():
                    scores = chosen[1][t][chosen[0][t].tolist().index(e)].sigmoid()
                    expected[e] += (seen[0][t] * scores) ** 2 / len(ids)
    np.testing.assert_allclose(found["layers.0.moe.experts.w1"], expected.numpy(), rtol=1e-4)
    assert found["layers.0.moe.experts.w2"].shape == (3, 256)
    errors = {}
    for name, importance in (("plain", None), ("weighed", found)):
        path = save(tmp_path / f"{name}.gguf", config, original, format="gguf", dtype="q4_k_m", importance=importance)
        with open_checkpoint(path) as quantised:
            matrix = "layers.0.moe.experts.w2"
            errors[name] = float((found[matrix][:, None] * (quantised[matrix] - original[matrix]) ** 2).sum())
    assert errors["weighed"] < 0.99 * errors["plain"]


def test_bad_calibration_texts_are_refused(model: Path, tmp_path: Path, herd_command: Command) -> None:
    pytest.importorskip("torch")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, said, expected in (
        ("empty.txt", "is empty", 2),
        ("latin.txt", "not UTF-8", 3),
        ("nowhere.txt", "to fix: name a file", 2),
        (".", "to fix: name a file", 2),
    ):
        code, _, err = herd_command("quantize", model, tmp_path / "m.gguf", "--imatrix", tmp_path / name)
        assert code == expected and said in err and not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("name", [*MIXES, "f32", "f16", "bf16"])
def test_importance_is_refused_where_it_would_change_nothing(
    name: str, tmp_path: Path, herd_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The types that are said to use it are those whose files differ with it."""
    config = LlamaConfig.from_dict(CONFIG.to_dict() | {"n_layers": 1, "ffn_dim": 256})
    original = weights(config)
    importance = {key: np.linspace(0.01, 9, array.shape[-1], dtype=np.float32) for key, array in original.items()}
    files = [
        save(tmp_path / f"{i}.gguf", config, original, format="gguf", dtype=name, importance=given).read_bytes()
        for i, given in enumerate((None, importance))
    ]
    assert weighs_errors(name) == (files[0] != files[1])
    if not weighs_errors(name):
        monkeypatch.setattr("herd.cli.quantize._importance", lambda *_: pytest.fail("it was computed"))
        code, _, err = herd_command("quantize", "m", tmp_path / "m", "--type", name.upper(), "--imatrix", tmp_path)
        allowed = err.partition("allowed: ")[2].partition(";")[0].split(", ")
        assert code == 2 and "leave --imatrix out" in err and name not in allowed
        assert {"q4_0", "q2_k", "q4_k_m"} < set(allowed) < set(MIXES)


def test_a_misspelt_instruction_set_is_the_users_mistake(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    result = subprocess.run(
        [sys.executable, "-m", "herd", "doctor"], capture_output=True, text=True, env=os.environ | {"HERD_ISA": "avx51"}
    )
    assert result.returncode == 2 and "HERD_ISA=avx51 is no instruction set; allowed: scalar, avx2" in result.stderr


def test_mixes_are_for_gguf_only(tmp_path: Path) -> None:
    with pytest.raises(HerdError, match=r"cannot store this dtype; got q4_k_m.*herd quantize"):
        save(tmp_path / "m", CONFIG, weights(), format="hf", dtype="q4_k_m")
