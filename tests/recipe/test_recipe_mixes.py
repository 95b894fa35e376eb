"""`herd scaling mix-run`: the plan of its recipes with a stand-in for training, and four tiny models with the real
one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from herd.cli import main
from herd.corpus import CorpusConfig, Document
from herd.corpus.document import write_documents
from herd.errors import UsageError
from herd.files import write_json
from herd.pretrain import PretrainConfig
from herd.pretrain.scaling import fit_mixes, read_mixes
from herd.recipe import Recipe, Stage, StageContext, StageFailed
from herd.recipe.mixes import MIXES_FILE, mix_recipe, own_mix, run_mixes
from herd.recipe.tokenise import TokenizerConfig

SOURCES = {"code": {"weight": 3, "kind": "code"}, "prose": {"weight": 1, "kind": "prose"}}
STAGES: dict[str, Any] = {
    "corpus": {"sources": ["python-stdlib"]},
    "tokenizer": {"vocab_size": 320},
    "base": {"sources": SOURCES, "max_minutes": 3, "train": {"seq_len": 64, "steps": 9}},
    "report": {},
}
RECIPE = Recipe(name="small", source="small.yaml", seed=5, stages=STAGES)
MIXES = [{"code": share, "prose": 1 - share} for share in (0.1, 0.3, 0.5, 0.7, 0.9)]


class _Workshop:
    """A stand-in for the stages, whose losses follow a law."""

    def __init__(self, held: tuple[str, ...] = ("code", "prose")) -> None:
        self.trained: list[PretrainConfig] = []
        self.held, self.fail_at = held, -1

    def table(self) -> list[Stage]:
        return [
            Stage("corpus", CorpusConfig, self.corpus),
            Stage("tokenizer", TokenizerConfig, self.tokenizer, inputs=("corpus",)),
            Stage("base", PretrainConfig, self.base, inputs=("corpus", "tokenizer")),
        ]

    def corpus(self, config: Any, inputs: Mapping[str, Path], out: Path, context: StageContext) -> str:
        write_documents(out / "heldout.jsonl", [Document("text", kind, meta={"kind": kind}) for kind in self.held])
        return "corpus"

    def tokenizer(self, config: Any, inputs: Mapping[str, Path], out: Path, context: StageContext) -> str:
        return "words"

    def base(self, config: Any, inputs: Mapping[str, Path], out: Path, context: StageContext) -> str:
        if len(self.trained) == self.fail_at:
            raise OSError("the disk is gone")
        self.trained.append(config)
        share = config.sources["code"].weight
        losses = {"code": 2 + np.exp(1 - 2 * share), "prose": 3 + np.exp(share)}
        parts = {name: {"heldout_loss": float(loss), "epochs": 0.5} for name, loss in losses.items()}
        result = {"training_flops": 1e12, "tokens": 576, "parameters": 9, "stage_seconds": 1.0, "heldout_loss": 2.5}
        write_json(out / "result.json", result | {"sources": parts})
        return "trained"


def test_mixes_are_trained_once_and_go_on(tmp_path: Path) -> None:
    shop, said = _Workshop(), []
    shop.fail_at = 3
    with pytest.raises(StageFailed, match=r"the disk is gone.*herd again goes on"):
        run_mixes(RECIPE, MIXES, shop.table(), tmp_path, command="herd again")
    assert len(read_mixes(tmp_path / MIXES_FILE)) == 3
    shop.fail_at = -1
    rows = run_mixes(
        RECIPE, MIXES, shop.table(), tmp_path, command="", on_mix=lambda number, mix, row: said.append((number, row))
    )
    assert len(shop.trained) == len(rows) == 5 and said[:2] == [(1, None), (1, rows[0])] and len(said) == 10
    assert run_mixes(RECIPE, MIXES, shop.table(), tmp_path, command="") == rows and len(shop.trained) == 5
    for config, mix in zip(shop.trained, MIXES, strict=True):
        assert {name: source.weight for name, source in config.sources.items()} == mix
        assert config.sources["code"].kind == "code" and config.train.steps == 9
        assert config.max_minutes is None and config.seed == 5  # all steps, and the same start
    fit = fit_mixes(read_mixes(tmp_path / MIXES_FILE))
    assert fit.predict({"code": 1})["code"].value == pytest.approx(2 + np.exp(-1), abs=1e-4)


def test_a_recipe_must_have_a_mix_and_held_out_text(tmp_path: Path) -> None:
    def refused(base: dict[str, Any], **stages: Any) -> str:
        with pytest.raises(UsageError) as error:
            own_mix(Recipe("a", {**STAGES, "base": base, **stages}))
        return str(error.value)

    assert own_mix(RECIPE) == {"code": 0.75, "prose": 0.25}
    assert "nothing to mix; got no sources" in refused({})
    assert "nothing to mix; got code" in refused({"sources": {"code": {"weight": 1}}})
    assert "no mix" in refused({"sources": SOURCES, "mix": [{"from_tokens": 9, "weights": {"code": 1}}]})
    assert "no mix" in refused({"sources": SOURCES, "anneal": {"weights": {"code": 1}}})
    assert "base.sources.code" in refused({"sources": {**SOURCES, "code": {"share": 1}}})
    with pytest.raises(UsageError, match="need the stage 'base'"):
        own_mix(Recipe("a", {"corpus": {}, "tokenizer": {}}))
    shop = _Workshop(held=("code",))
    with pytest.raises(UsageError, match=r"'prose' has none.*corpus.heldout_fraction"):
        run_mixes(RECIPE, MIXES, shop.table(), tmp_path, command="")
    assert not shop.trained and list(mix_recipe(RECIPE, 1, MIXES[0]).stages) == ["corpus", "tokenizer", "base"]


def test_four_tiny_models_make_a_table(tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, run_dir = tmp_path / "text.jsonl", tmp_path / "run"
    code = [{"text": "\n".join(f"def f{n + i}(a):\n    return a + {i}" for i in range(4)), "url": f"lib/{n}.py",
             "meta": {"kind": "code"}} for n in range(120)]  # fmt: skip
    prose = [{"text": " ".join(f"The number {n} comes before {n + i}, as all know." for i in range(4)),
              "url": f"notes/{n}.txt"} for n in range(120)]  # fmt: skip
    text.write_text("\n".join(map(json.dumps, [*code, *prose])))
    given = [str(repository / "tests/recipe/tiny.yaml"), f"corpus.sources=['{text}']", "tokenizer.vocab_size=300"]
    given += ["corpus.near_duplicates.enabled=false", "corpus.lines.enabled=false", "base.evaluations=0"]
    given += ["base.train.seq_len=64", "base.train.steps=12", f"base.sources={json.dumps(SOURCES)}", "--mixes=4"]
    printed = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            main(["scaling", "mix-run", *given, "--out", str(run_dir), "--json"])
        assert not stop.value.code
        printed.append(json.loads(capsys.readouterr().out))
        manifests = {file: file.stat().st_mtime_ns for file in run_dir.glob("base-*/stage.json")}
    assert printed[0] == printed[1] and len(manifests) == 4
    assert all(file.stat().st_mtime_ns == time for file, time in manifests.items())
    runs = read_mixes(run_dir / MIXES_FILE)
    assert runs[0].weights == pytest.approx({"code": 0.75, "prose": 0.25})
    assert max(run.flops for run in runs) < 1.01 * min(run.flops for run in runs)
    assert all(set(run.losses) == {"code", "prose"} for run in runs)
    most = max(runs, key=lambda run: run.weights["code"])
    least = min(runs, key=lambda run: run.weights["code"])
    assert most.losses["code"] < least.losses["code"] and most.losses["prose"] > least.losses["prose"]
