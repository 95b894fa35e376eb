"""Checkpoints of the state: atomic, verified, harmless to read, and complete enough for the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from herd.architecture import LlamaConfig
from herd.corpus import pack_examples
from herd.errors import FileFormatError, HerdError, UsageError
from herd.files import sha256_file, write_json
from herd.model import Llama
from herd.train import PackedSource, StateStore, TrainConfig, Trainer, next_token_loss

SHAPE = LlamaConfig(
    dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=24, vocab_size=32, context_length=64
)


def _trainer(out: Path, shape: LlamaConfig = SHAPE, seed: int = 0, text: int = 0, **fields: Any) -> Trainer[Any]:
    rng = np.random.default_rng(text)
    examples = [((int(rng.integers(32)) + 3 * np.arange(9)) % 32, rng.random(9) < 0.8) for _ in range(40)]
    settings: dict[str, Any] = {"steps": 12, "seq_len": 16, "batch_size": 4, "lr": 0.01, "precision": "fp32"}
    settings |= {"compile": "off", "checkpoint_seconds": 0, "checkpoint_every": 4, "log_every": 1}
    config = TrainConfig.model_validate(settings | fields)
    source = PackedSource(pack_examples(examples, 16, 4, seed=2), config.micro_batch_rows)
    model = Llama(shape)
    model.init_weights(seed)
    return Trainer(model, next_token_loss, source, config, out)


def _bits(trainer: Trainer[Any]) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in trainer.model.parameters()]


@pytest.mark.parametrize("fields", [{}, {"optimizer": "muon"}, {"average": "ema"}, {"average": "tail", "tail": 0.8}])
def test_a_stopped_run_continues_to_the_same_bits(tmp_path: Path, fields: dict[str, Any]) -> None:
    whole = _trainer(tmp_path / "whole", **fields)
    expected = whole.fit()
    part = _trainer(tmp_path / "part", **fields)
    for _ in range(7):
        part.train_step()
    part.save()
    # Another model, other weights: everything must come from the state.
    rest = _trainer(tmp_path / "part", seed=9, **fields)
    result = rest.fit()
    assert result.resumed_from == 7
    assert _bits(rest) == _bits(whole)
    assert result.loss == expected.loss and result.tokens == expected.tokens
    lines = [[_timeless(line) for line in _lines(tmp_path / name)] for name in ("whole", "part")]
    assert lines[0] == lines[1]


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "mfu", "memory_bytes")}


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    first = _trainer(tmp_path)
    expected = first.fit()
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    again = _trainer(tmp_path, seed=5)
    result = again.fit()
    assert result.resumed_from == 12 and result.loss == expected.loss
    assert _bits(again) == _bits(first)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_the_newest_are_kept_and_each_is_committed_by_its_manifest(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, keep=2)
    trainer.fit()
    assert trainer.store.steps() == [8, 12]
    directory = trainer.store.path(12)
    manifest = json.loads((directory / "manifest.json").read_text())
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == {
        name: sha256_file(directory / name) for name in ("tensors.safetensors", "state.json")
    }
    (directory / "manifest.json").unlink()
    assert trainer.store.steps() == [8]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "state"])
def test_a_damaged_checkpoint_is_passed_over_aloud(
    tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = _trainer(tmp_path / "run")
    whole.fit()
    newest = whole.store.path(12)
    if damage == "flip":
        content = bytearray((newest / "tensors.safetensors").read_bytes())
        content[len(content) // 2] ^= 1
        (newest / "tensors.safetensors").write_bytes(content)
    elif damage == "truncate":
        (newest / "tensors.safetensors").write_bytes((newest / "tensors.safetensors").read_bytes()[:-10])
    elif damage == "remove":
        (newest / "state.json").unlink()
    elif damage == "manifest":
        (newest / "manifest.json").write_text('{"format": "herd-train-st')
    else:
        (newest / "state.json").write_text("{}")
    again = _trainer(tmp_path / "run", seed=3)
    assert again.fit().resumed_from == 8
    assert _trainer(tmp_path / "run").fit().resumed_from == 12, "the damaged one was replaced"
    assert "the checkpoint of step 12 is damaged and passed over" in capfd.readouterr().err
    assert _bits(again) == _bits(whole)


def test_when_all_are_damaged_nothing_is_thrown_away_in_silence(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.fit()
    for step in trainer.store.steps():
        (trainer.store.path(step) / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(HerdError, match=r"all 2 checkpoints .* are damaged.*to fix: remove"):
        _trainer(tmp_path).fit()


class _Payload:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_a_foreign_file_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = _trainer(tmp_path)
    trainer.fit()
    directory = trainer.store.path(12)
    torch.save({"model": _Payload()}, directory / "tensors.safetensors")
    manifest = json.loads((directory / "manifest.json").read_text())
    file = directory / "tensors.safetensors"
    manifest["files"]["tensors.safetensors"] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    write_json(directory / "manifest.json", manifest)
    with pytest.raises(FileFormatError, match="is not a file of tensors"):
        _trainer(tmp_path).fit()
    assert "executed" not in capsys.readouterr().out


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    _trainer(tmp_path).fit()
    with pytest.raises(UsageError, match=r"was trained with lr=0.01; got lr=0.02; to fix: use lr=0.01"):
        _trainer(tmp_path, lr=0.02).fit()
    # How often it is saved or logged does not change what is computed.
    assert _trainer(tmp_path, keep=1, checkpoint_every=3, log_every=7).fit().resumed_from == 12


def test_other_data_is_refused_and_how_it_is_cut_does_not_matter(tmp_path: Path) -> None:
    _trainer(tmp_path, micro_batch=4).fit()
    with pytest.raises(UsageError, match="was trained on other data; to fix: train into another directory"):
        _trainer(tmp_path, micro_batch=4, text=1).fit()
    assert _trainer(tmp_path, micro_batch=2).data == _trainer(tmp_path, micro_batch=4).data


def test_another_model_is_refused(tmp_path: Path) -> None:
    _trainer(tmp_path).fit()
    import dataclasses

    with pytest.raises(HerdError, match="do not fit this model"):
        _trainer(tmp_path, shape=dataclasses.replace(SHAPE, ffn_dim=40)).fit()


def test_leftovers_of_a_kill_are_swept(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    leftover = tmp_path / ".step-00000004.abc.part"
    leftover.mkdir(parents=True)
    (leftover / "tensors.safetensors").write_bytes(b"half")
    store.sweep()
    assert not leftover.exists() and store.load_newest({}) is None


def test_the_clock_saves_too(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, checkpoint_every=0, checkpoint_seconds=1e-9, keep=100)
    trainer.fit()
    assert trainer.store.steps() == list(range(13))
