"""`herd run --dry-run` where what a recipe reads is not there: everything is shown, and what is missing is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from herd.cli import main
from herd.corpus import STDLIB
from herd.errors import UsageError
from herd.recipe import load_recipe, place, preview, stage_table
from tests.recipe.published import NAMES, recipes_at


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with the published recipes, and nothing that they read."""
    recipes_at(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_published_recipes_show_their_stages_without_their_text(folder: Path, name: str) -> None:
    recipe = load_recipe(name)
    placed = place(recipe, stage_table(), "runs/x", allow_missing=True)
    corpus = placed[0]
    sources = [source for source in recipe.stages["corpus"]["sources"] if source != STDLIB]
    if not sources:
        pytest.skip("reads what is always there")
    assert [error.value for error in corpus.bound.missing] == sources
    assert [(item.hash, item.directory.name) for item in placed] == [("", f"{one}-????????") for one in recipe.stages]
    reasons = [decision.reason for _, decision in preview(placed)]
    assert reasons[0] == f"needs {', '.join(sources)}"
    with pytest.raises(UsageError, match=f"corpus: there is no such source; got {sources[0]}"):
        place(recipe, stage_table(), "runs/x")


def test_the_command_says_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def herd(*arguments: str) -> int:
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        return int(left.value.code or 0)

    assert herd("run", "llama3.1-long-8b", "--dry-run", "--json") == 0
    shown = capsys.readouterr()
    stages = {stage["stage"]: stage for stage in json.loads(shown.out)["stages"]}
    assert stages["base"]["config"]["train"]["steps"] == 47_684
    assert stages["base"]["missing"] == ["runs/llama3.1-8b"] and stages["base"]["directory"] is None
    for words in ("got data/knowledge", "got data/annealing", "base: there is no such run yet", "herd run llama3.1-8b"):
        assert words in shown.err
    assert herd("run", "llama3.1-long-8b", "--dry-run") == 0
    assert "needs runs/llama3.1-8b" in capsys.readouterr().out
    assert herd("run", "llama3.1-long-8b") == 2
    assert "there is no such source; got data/knowledge" in capsys.readouterr().err
    assert not (folder / "runs").exists()
    assert herd("run", "llama3.1-long-8b", "base.train.lr=-1", "--dry-run") == 2, "what is wrong stays an error"
    assert "train.lr" in capsys.readouterr().err


def test_stages_that_do_not_wait_for_it_are_known(folder: Path) -> None:
    """One of two sources is there; a checkpoint is not."""
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("Text.\n")
    overrides = ["corpus.sources=[text]", "tokenizer.file=elsewhere"]
    placed = place(load_recipe("llama1", overrides), stage_table(), "runs/x", allow_missing=True)
    assert [bool(item.hash) for item in placed[:3]] == [True, False, False]
    assert "????????" not in placed[0].directory.name
    reasons = [decision.reason for _, decision in preview(placed)]
    assert reasons[:3] == ["new", "needs elsewhere", "after corpus"]
