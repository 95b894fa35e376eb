"""A recipe whose phases are judged: it falls short, goes on when less is asked, and leaves what any stage leaves."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from herd.cli import main

SHORT = """
name: short
stages:
  corpus: {sources: [text], heldout_fraction: 0.1}
  tokenizer: {vocab_size: 400, n_specials: 16}
  base:
    model: {dim: 32, n_layers: 2, n_heads: 2, n_kv_heads: 1, ffn_dim: 64, context_length: 128}
    evaluations: 0
    train: {steps: 20, seq_len: 64, batch_size: 4, lr: 1e-2, compile: off, precision: fp32}
"""
LONG = """
name: long
stages:
  corpus: {sources: [text], heldout_fraction: 0.1}
  tokenizer: {file: runs/short}
  base:
    model: {dim: 32, n_layers: 2, n_heads: 2, n_kv_heads: 1, ffn_dim: 64, context_length: 128}
    init_from: runs/short
    promote: {needles: 0, tolerance: 0.02}
    phases: [{from_tokens: 1024, seq_len: 128, batch_size: 2}]
    evaluations: 0
    train: {steps: 8, seq_len: 64, batch_size: 4, lr: 0.5, warmup: 0, log_every: 1, compile: off, precision: fp32}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both recipes, the first of which has run."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(Path(sysconfig.get_path("stdlib"), "json"), folder / "text")
    (folder / "short.yaml").write_text(SHORT)
    (folder / "long.yaml").write_text(LONG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert _herd("run", "short.yaml") == 0
    return folder


def _herd(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def _base(folder: Path) -> tuple[Path, dict[str, Any]]:
    (directory,) = (folder / "runs" / "long").glob("base-*")
    return directory, json.loads((directory / "stage.json").read_text())


def test_it_goes_on_when_less_is_asked(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    assert _herd("run", "long.yaml") == 3
    said = capsys.readouterr().err.splitlines()[-1]
    directory, manifest = _base(project)
    assert "stage 'base' failed: phase 1, with rows of 64 tokens, is not promoted at step 4: bits per byte of" in said
    assert said.endswith(f"the weights in runs/long/{directory.name}/unpromoted/step-00000004")
    assert manifest["status"] == "failed" and (directory / "unpromoted" / "step-00000004" / "config.json").is_file()

    assert _herd("run", "long.yaml", "base.promote.tolerance=null") == 0
    again, manifest = _base(project)
    assert again == directory and manifest["status"] == "done" and manifest["attempts"] == 2
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "lr" in line] == list(range(1, 9))
    assert not any(name.startswith(("promotion", "unpromoted")) for name in manifest["artefacts"])
    assert (directory / "promotion.json").is_file()

    capsys.readouterr()
    assert _herd("run", "long.yaml", "base.promote.tolerance=0.5") == 0  # what is done is done
    assert "unchanged" in "".join(line for line in capsys.readouterr().err.splitlines() if "base" in line)


def test_what_is_wrong_with_the_criteria_is_said_first(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    cases = {
        "corpus.heldout_fraction=0": (2, "held-out text, and there is none; to fix: corpus.heldout_fraction=0.01"),
        "base.train.anneal=4": (2, "the last phase would begin after step 4, and annealing, or the end, comes after"),
        "base.promote.short=129": (2, "promote.short is more than the first model reads; got 129; allowed: 1 to 128"),
        "base.promote.needles=1": (2, "promote: a length leaves no room for a haystack; got 64"),
    }
    for change, (code, said) in cases.items():
        assert _herd("run", "long.yaml", "--out", "runs/other", change) == code, change
        error = capsys.readouterr().err.splitlines()[-1]
        assert said in error and "Traceback" not in error, error
        assert not list(Path("runs/other").glob("base-*/state"))
