"""`herd convert`, `herd inspect`, and the tokenizer that travels with a checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import herd.tokenizer
from herd import HerdError
from herd.architecture import LlamaConfig
from herd.checkpoint import convert, open_checkpoint, save

Small = Callable[..., tuple[LlamaConfig, dict[str, np.ndarray]]]
TEXT = "the quick brown fox jumps over the lazy dog and runs away " * 40


Command = Callable[..., tuple[int, str, str]]


def test_convert_then_inspect(tmp_path: Path, small: Small, herd_command: Command) -> None:
    config, weights = small("llama3.1")
    source = save(tmp_path / "hf", config, weights)
    code, out, err = herd_command("convert", source, tmp_path / "m.gguf", "--to", "gguf", "--dtype", "q8_0")
    assert (code, err) == (0, "") and "gguf" in out
    code, _, err = herd_command("convert", source, tmp_path / "m.gguf", "--to", "gguf")
    assert code == 2 and "--force" in err
    code, out, _ = herd_command("convert", source, tmp_path / "meta", "--to", "meta", "--shards", 2, "--json")
    assert code == 0 and json.loads(out)["format"] == "meta"

    code, out, err = herd_command("inspect", tmp_path / "m.gguf", "--check")
    assert (code, err) == (0, "")
    for part in ("format gguf", "74,048 parameters", "layers.0.attention.wq.weight", "all weights are finite: yes"):
        assert part in out
    assert "layers.1.attention.wq.weight" not in out
    assert "layers.1.attention.wq.weight" in herd_command("inspect", tmp_path / "m.gguf", "--tensors")[1]
    code, out, _ = herd_command("inspect", tmp_path / "meta", "--json")
    data = json.loads(out)
    assert data["config"] == config.to_dict() and len(data["files"]) == 2
    assert data["parameters"] == 74_048 and data["tensor_bytes"] == 2 * 74_048


def test_only_a_checkpoint_is_replaced(tmp_path: Path, small: Small, herd_command: Command) -> None:
    source = save(tmp_path / "model.gguf", *small("llama3.1"), format="gguf")
    app = tmp_path / "app"
    app.mkdir()
    (app / "config.json").write_text("{}")
    code, _, err = herd_command("convert", source, app, "--to", "hf", "--force")
    assert code == 2 and "is not a checkpoint; it was left alone" in err and (app / "config.json").read_text() == "{}"
    clone = save(tmp_path / "clone", *small("llama3.1"))
    (clone / ".git").mkdir()
    code, _, err = herd_command("convert", source, clone, "--to", "hf", "--force")
    assert code == 2 and "holds more than a checkpoint" in err and (clone / ".git").is_dir()
    (clone / ".git").rmdir()
    assert herd_command("convert", source, clone, "--to", "hf", "--force")[0] == 0


def test_inspect_finds_weights_that_are_no_numbers(tmp_path: Path, small: Small, herd_command: Command) -> None:
    config, weights = small("llama3")
    weights["layers.1.ffn.w2.weight"][3, 4:6] = np.nan
    save(tmp_path / "hf", config, weights)
    code, out, _ = herd_command("inspect", tmp_path / "hf", "--check", "--json")
    assert code == 3 and json.loads(out)["not_finite"] == {"layers.1.ffn.w2.weight": 2}


def test_a_damaged_file_gives_a_message_not_a_traceback(tmp_path: Path, herd_command: Command) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\3\0\0\0")
    code, out, err = herd_command("inspect", tmp_path / "bad.gguf")
    assert (code, out) == (3, "") and "bad.gguf, field" in err and "Traceback" not in err


@pytest.mark.parametrize("row", ["llama3.2", "llama4-maverick"])
def test_verify_finds_no_difference_after_a_conversion(
    row: str, tmp_path: Path, small: Small, herd_command: Command
) -> None:
    pytest.importorskip("torch")
    from herd.model import largest_difference

    config, weights = small(row)
    source = save(tmp_path / "hf", config, weights)
    code, out, _ = herd_command("convert", source, tmp_path / "meta", "--to", "meta", "--verify", "--json")
    assert code == 0 and json.loads(out)["largest_logit_difference"] == 0.0
    quantised = convert(source, tmp_path / "m.gguf", to="gguf", dtype="q4_0")
    assert 1e-4 < largest_difference(source, quantised) < 1


@pytest.mark.parametrize("to", ["hf", "meta", "gguf"])
def test_the_tokenizer_travels_along(to: str, tmp_path: Path, small: Small) -> None:
    config, weights = small("llama3")
    tokenizer = herd.tokenizer.train([TEXT, TEXT.upper(), TEXT.title()], vocab_size=300, n_specials=11)
    config = replace(config, vocab_size=320)
    for name in ("embed.weight", "output.weight"):
        weights[name] = np.zeros((320, 64), weights[name].dtype)
    source = save(tmp_path / "start", config, weights, tokenizer=tokenizer)
    target = convert(source, tmp_path / ("m.gguf" if to == "gguf" else "m"), to=to)
    back = convert(target, tmp_path / "back", to="hf")
    for path in (target, back):
        with open_checkpoint(path) as checkpoint:
            found = checkpoint.tokenizer
            assert found.encode("The lazy FOX") == tokenizer.encode("The lazy FOX")
            assert found.stop_ids == tokenizer.stop_ids and found.bos_id == tokenizer.bos_id
    settings: dict[str, Any] = json.loads((back / "config.json").read_text())
    assert settings["bos_token_id"] == tokenizer.bos_id
    assert settings["eos_token_id"] == sorted(tokenizer.stop_ids)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path, small: Small) -> None:
    config, weights = small("llama3")
    tokenizer = herd.tokenizer.train([TEXT, TEXT.upper(), TEXT.title()], vocab_size=300, n_specials=11)
    with pytest.raises(HerdError, match="more tokens than the embedding"):
        save(tmp_path / "m.gguf", config, weights, format="gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_the_room_needs_no_torch(tmp_path: Path, small: Small) -> None:
    config, weights = small("llama3")
    save(tmp_path / "hf", config, weights)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from herd.checkpoint import convert, open_checkpoint\n"
        f"convert({str(tmp_path / 'hf')!r}, {str(tmp_path / 'meta')!r}, to='meta')\n"
        f"print(len(open_checkpoint({str(tmp_path / 'meta')!r})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(weights)
