"""The extend stage: a run whose context grows, what it leaves, and what builds on it."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from herd import checkpoint
from herd.cli import main
from herd.errors import HerdError, UsageError
from herd.evaluate.needle import grid
from herd.recipe import load_recipe, place, run, stage_table
from herd.recipe.long_context import LongContextConfig, lengthen
from tests.recipe.published import RECIPES

TINY = """
name: tiny
stages:
  corpus: {{sources: ['{sources}'], heldout_fraction: 0.1}}
  tokenizer: {{vocab_size: 400, n_specials: 16}}
  base:
    model: {{dim: 32, n_layers: 2, n_heads: 2, n_kv_heads: 1, ffn_dim: 64, context_length: 128}}
    evaluations: 0
    train: {{steps: 20, seq_len: 128, batch_size: 4, lr: 1e-2, compile: off, precision: fp32}}
  extend:
    to: 512
    steps: 3
    batch_size: 2
    chats: 0.5
    optimizer: muon
    lr: 1e-3
    schedule: linear
    tolerance: 1
    needles: 0
    probe_tokens: 2000
  sft:
    exercises: 60
    max_turns: 1
    epochs: null
    train: {{steps: 2, seq_len: 256, batch_size: 2, compile: off, precision: fp32}}
  report: {{}}
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for file in Path(sysconfig.get_path("stdlib"), "json").glob("*.py"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def recipe(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(TINY.format(sources=sources))
    return file


@pytest.fixture(scope="module")
def tiny(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    return run_dir, run(load_recipe(recipe), stage_table(), run_dir)


def _directory(tiny: tuple[Path, dict[str, Any]], stage: str) -> Path:
    run_dir, state = tiny
    return run_dir / str(state["stages"][stage]["directory"])


def _context(path: Path) -> int:
    with checkpoint.open_checkpoint(path) as opened:
        return opened.config.context_length


def test_what_comes_after_builds_on_the_longer_model(tiny: tuple[Path, dict[str, Any]]) -> None:
    run_dir, _ = tiny
    assert _context(_directory(tiny, "base") / "checkpoint") == 128
    for path in (_directory(tiny, "extend") / "checkpoint", checkpoint.resolve(run_dir)):
        assert _context(path) == 512
    assert checkpoint.continuing(run_dir) == (_directory(tiny, "extend") / "checkpoint").resolve()
    rows = [json.loads(line) for line in (_directory(tiny, "extend") / "stage-512" / "metrics.jsonl").open()]
    rates = [row["lr"] for row in rows if "loss" in row]
    assert rates == pytest.approx([1e-3 * left / 3 for left in (2, 1, 0)]), "linear, down to zero"
    manifest = json.loads((_directory(tiny, "extend") / "stage.json").read_text())
    assert "checkpoint/config.json" in manifest["artefacts"] and "512 tokens" in manifest["summary"]
    assert "Longer context" in (_directory(tiny, "report") / "report.html").read_text()


def test_needles_are_asked_for_before_and_after(
    tiny: tuple[Path, dict[str, Any]], sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LongContextConfig(
        to=512, steps=1, batch_size=1, tolerance=1, needles=0.5, lengths=2, depths=3, samples=1, probe_tokens=2000,
        haystack=(str(sources),),
    )  # fmt: skip
    base, corpus = _directory(tiny, "base") / "checkpoint", _directory(tiny, "corpus")
    state = lengthen(config, base, corpus, tmp_path / "out")
    assert "needles: 0 of 6 found, fewest at 256 tokens: 0 of 3 (" in capsys.readouterr().err
    assert state["before"] == 0 and "needles found 0, at least 0.5 wanted" in state["stopped"]
    for folder in ("before", "stage-512/needle"):
        grid = json.loads((tmp_path / "out" / folder / "needle.json").read_text())
        assert [row["length"] for row in grid["by_length"]] == [256, 512] and len(grid["cells"]) == 6
        assert (tmp_path / "out" / folder / "needle.html").is_file()
    assert not (tmp_path / "out" / "before" / "model").exists()
    state = lengthen(config.model_copy(update={"needles": 0.0}), base, corpus, tmp_path / "out")
    assert state["stopped"] is None, "judged by less, the trained stage is enough"


def test_another_grid_is_asked_and_an_impossible_one_is_refused_before_the_training(
    tiny: tuple[Path, dict[str, Any]], sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LongContextConfig(
        to=512, steps=1, batch_size=1, tolerance=1, needles=0.5, lengths=2, depths=2, samples=1, digits=1,
        probe_tokens=2000, haystack=(str(sources),),
    )  # fmt: skip
    base, corpus, out = _directory(tiny, "base") / "checkpoint", _directory(tiny, "corpus"), tmp_path / "out"
    with pytest.raises(UsageError, match="no room for a haystack"):
        lengthen(config.model_copy(update={"lengths": 40}), base, corpus, out)
    with pytest.raises(UsageError, match="no such source; got /nowhere"):
        lengthen(config.model_copy(update={"haystack": ("/nowhere",)}), base, corpus, out)
    assert not out.exists()
    lengthen(config, base, corpus, out)
    monkeypatch.setattr("herd.pretrain.extending.run", lambda *_: pytest.fail("trained again"))
    for changed in ({"digits": 3}, {"samples": 2}, {"lengths": 1}):
        config = config.model_copy(update=changed)
        lengthen(config, base, corpus, out)
        for folder in ("before", "stage-512/needle") if config.lengths > 1 else ("stage-512/needle",):
            found = json.loads((out / folder / "needle.json").read_text())["config"]
            assert (found["digits"], found["samples"]) == (config.digits, config.samples)
            assert len(found["lengths"]) == config.lengths


@pytest.mark.parametrize("stop_at", [2, 6], ids=["before", "after"])
@pytest.mark.parametrize("changed", [{}, {"digits": 3}], ids=["same", "other"])
def test_a_grid_that_was_interrupted(
    stop_at: int,
    changed: dict[str, Any],
    tiny: tuple[Path, dict[str, Any]],
    sources: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same grid goes on, another one begins anew; there are four cells before the training and four after it."""
    config = LongContextConfig(
        to=512, steps=1, batch_size=1, tolerance=1, needles=0.5, lengths=2, depths=2, samples=1, probe_tokens=2000,
        haystack=(str(sources),),
    )  # fmt: skip
    base, corpus, out, asked = _directory(tiny, "base") / "checkpoint", _directory(tiny, "corpus"), tmp_path / "out", []
    ask = grid._ask

    def counted(*arguments: Any) -> dict[str, Any]:
        asked.append(arguments[-2:])
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        return ask(*arguments)

    monkeypatch.setattr(grid, "_ask", counted)
    with pytest.raises(KeyboardInterrupt):
        lengthen(config, base, corpus, out)
    config = config.model_copy(update=changed)
    lengthen(config, base, corpus, out)
    assert len(asked) == (stop_at + 8 if changed else 9)
    for folder in ("before", "stage-512/needle"):
        found = json.loads((out / folder / "needle.json").read_text())
        assert found["config"]["digits"] == config.digits and len(found["cells"]) == 4
    assert not (out / "before" / "model").exists()


def test_what_comes_after_stays_when_it_is_judged_otherwise(
    recipe: Path, tiny: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(tiny[0], copy)
    done = []
    state = run(
        load_recipe(recipe, ["extend.tolerance=0.9"]),
        stage_table(),
        copy,
        on_event=lambda event: done.append((event.kind, event.stage)),
    )
    assert state["stages"]["sft"] == tiny[1]["stages"]["sft"]
    assert ("done", "extend") in done and ("skip", "sft") in done


def test_an_extension_that_loses_something_ends_the_run(
    recipe: Path, tiny: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(tiny[0], copy)
    strict = load_recipe(recipe, ["extend.tolerance=0", "extend.lr=0.2", "extend.muon_lr=0.2"])
    with pytest.raises(HerdError, match=r"the extension stopped at 512 tokens: bits per byte of short text .* wanted"):
        run(strict, stage_table(), copy)


def test_judged_otherwise_the_stage_goes_on_where_it_is(
    recipe: Path, tiny: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(tiny[0], copy)
    with pytest.raises(HerdError, match="bits per byte of short text"):
        run(load_recipe(recipe, ["extend.tolerance=0", "extend.lr=0.2"]), stage_table(), copy)
    monkeypatch.setattr("herd.pretrain.extending.run", lambda *_: pytest.fail("trained again"))
    state = run(load_recipe(recipe, ["extend.tolerance=1", "extend.lr=0.2", "sft=false"]), stage_table(), copy)
    assert _context(copy / state["stages"]["extend"]["directory"] / "checkpoint") == 512
    with pytest.raises(HerdError, match="bits per byte of short text"):  # what was good enough is judged again
        run(load_recipe(recipe, ["extend.tolerance=0", "extend.lr=0.2", "sft=false"]), stage_table(), copy)


def test_a_stage_needs_something_to_extend(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for overrides, said in (
        (["base=false", "sft=false"], "nothing to extend"),
        (["base=false", "sft=false", "extend.init_from=runs/pocket"], "herd run pocket makes it"),
        (["base=false", "extend=false"], "this stage needs a model"),
        (["sft.train.seq_len=1024"], "1024"),
    ):
        with pytest.raises(UsageError, match=said):
            place(load_recipe(recipe, overrides), stage_table(), tmp_path / "runs" / "x")


def test_the_long_pocket_recipe_runs_small(
    tiny: tuple[Path, dict[str, Any]], sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(RECIPES, tmp_path / "recipes")
    shutil.copytree(tiny[0], tmp_path / "runs" / "pocket-shrunk")
    monkeypatch.chdir(tmp_path)
    override = f"extend.init_from=runs/pocket-shrunk/{tiny[1]['stages']['base']['directory']}/checkpoint"
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["run", "pocket-long", "--shrink", "--text", str(sources), override])
    assert _context(checkpoint.resolve("runs/pocket-long-shrunk")) == 1024
