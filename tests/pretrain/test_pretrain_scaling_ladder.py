"""A ladder's plan against the architecture's own arithmetic, its run through the recipe runner, and the verbs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import Field

from herd.architecture import LlamaConfig, parameter_count, releases
from herd.cli import main
from herd.corpus import CorpusConfig
from herd.errors import UsageError
from herd.files import write_json
from herd.pretrain import PretrainConfig
from herd.pretrain.scaling import LadderConfig, PowerLaw, Run, fit_ladder, plan, read_runs
from herd.pretrain.scaling.isoflop import _grouped
from herd.pretrain.scaling.ladder import shape_of
from herd.recipe import Recipe, Stage, StageContext, StageFailed
from herd.recipe.ladder import LADDER_FILE, plan_ladder, run_ladder, rung_recipe
from herd.recipe.shape import ModelShape
from herd.recipe.tokenise import TokenizerConfig

REFERENCE = LlamaConfig(
    dim=128, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=32, ffn_dim=384, vocab_size=4096, context_length=512
)
RECIPE = Recipe(
    name="small",
    source="small.yaml",
    seed=5,
    stages={
        "corpus": {"sources": ["python-stdlib"]},
        "tokenizer": {"vocab_size": 320},
        "base": {
            "model": {"dim": 64, "context_length": 128, "rope_theta": 2e4},
            "max_minutes": 3,
            "train": {"seq_len": 64, "lr": 4e-3, "muon_lr": 8e-3, "micro_batch": 16, "optimizer": "muon", "steps": 9},
        },
        "report": {},
    },
)
BUDGETS = (1e11, 3e11, 1e12)
BEST = PowerLaw(1.5, 0.5)
"""Compute-optimal tokens of the losses that the stand-in for training returns."""


def test_a_rung_spends_its_budget() -> None:
    rungs = plan(LadderConfig(budgets=(1e16, 1e15, 3e15), sizes=4), REFERENCE, 512)
    assert [rung.budget for rung in rungs] == [1e15] * 4 + [3e15] * 4 + [1e16] * 4
    for rung in rungs:
        s = rung.shape
        # By hand: four attention and three feed-forward matrices a layer, the output; each weight costs 6, and scores
        # and values 2 · 2 · S/2 · dim forward, three times that with the backward pass.
        weights = s.n_layers * (4 * s.dim**2 + 3 * s.dim * s.ffn_dim + 2 * s.dim) + s.dim + 4096 * s.dim
        assert rung.weights == weights and rung.params == weights + 4096 * s.dim == parameter_count(s)
        assert rung.tokens == rung.steps * rung.batch_size * 512
        assert rung.flops == pytest.approx(rung.tokens * (6 * weights + 6 * s.n_layers * s.dim * 512), rel=1e-12)
        assert rung.flops == pytest.approx(rung.budget, rel=0.5 / rung.steps)
    for first in (0, 4, 8):
        ratios = [rung.tokens / rung.weights for rung in rungs[first : first + 4]]
        assert ratios == sorted(ratios, reverse=True) and ratios[0] > 3 * 20 and ratios[-1] < 20 / 3
        assert ratios[1] > 20 > ratios[2]


def test_shapes_follow_the_family_and_batches_and_rates_the_paper() -> None:
    for name in ("llama3.2-1b", "llama3.1-8b"):
        release = next(r for r in releases.values() if r.name == name).config
        shape = shape_of(release.dim, REFERENCE)
        assert (shape.n_layers, shape.n_heads, shape.head_dim) == (release.n_layers, release.n_heads, release.head_dim)
    assert shape_of(128, REFERENCE) == LlamaConfig.from_dict(REFERENCE.to_dict())
    ends = plan(LadderConfig(budgets=(6e18, 1e22), sizes=7), REFERENCE, 512)
    assert ends[0].batch_size * 512 == pytest.approx(250e3, rel=1e-3)
    assert ends[-1].batch_size * 512 == pytest.approx(4e6, rel=1e-3)
    small, large = ends[0], ends[-1]
    slope = np.log(large.lr_scale / small.lr_scale) / np.log(large.params / small.params)
    assert 400**slope == pytest.approx(0.5)  # 16B has half the rate of 40M
    assert (REFERENCE.dim, 1.0) in {(r.shape.dim, round(r.lr_scale, 9)) for r in _tiny(3e15)}


def _tiny(budget: float) -> list[Any]:
    return plan(LadderConfig(budgets=(budget, 3 * budget), sizes=4), REFERENCE, 512)


@pytest.mark.parametrize(
    ("budgets", "seq_len", "message"),
    [
        ((1e8, 1e15), 512, "no models lie on both sides.*budget 1e\\+08"),
        ((1e10, 1e15), 512, "budget"),
        ((1e15, float("1e41")), 512, "this is no budget"),
        ((1e15, 1e16), 513, "longer than the model's context.*up to 512"),
        ((1e15, 1e15), 512, "two budgets are as good as one; got 1e\\+15, 1e\\+15"),
        ((1e15, 3e15, 1.1e15), 512, "as good as one; got 1e\\+15, 1.1e\\+15; allowed: 1.25 times"),
    ],
)
def test_impossible_ladders_are_refused(budgets: tuple[float, ...], seq_len: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(LadderConfig(budgets=budgets), REFERENCE, seq_len)


def test_the_fit_tells_planned_budgets_apart_however_few_their_steps() -> None:
    row, fewest = 2**16, 1000
    reference = dataclasses.replace(REFERENCE, context_length=row)
    for budget in np.geomspace(2.5e14, 4e14, 60):
        try:
            rungs = plan(LadderConfig(budgets=(budget, 1.25 * budget), sizes=5, spread=9.0), reference, row)
        except UsageError:  # not steps enough
            continue
        fewest = min(fewest, *(rung.steps for rung in rungs))
        found = _grouped([Run(rung.flops, rung.params, rung.tokens, 2.0) for rung in rungs])
        assert [len(group) for group in found] == [5, 5], budget
    assert fewest == 12


class _BaseConfig(PretrainConfig):
    model: ModelShape = Field(default_factory=ModelShape, description="shape")


class _Workshop:
    """Stand-ins for the three stages: training returns the loss of a known law, or fails when told to."""

    def __init__(self) -> None:
        self.trained: list[_BaseConfig] = []
        self.fail_at: int | None = None

    def table(self) -> list[Stage]:
        return [
            Stage("corpus", CorpusConfig, self.corpus),
            Stage("tokenizer", TokenizerConfig, self.tokenizer, inputs=("corpus",)),
            Stage("base", _BaseConfig, self.base, inputs=("corpus", "tokenizer")),
        ]

    def corpus(self, config: Any, inputs: Mapping[str, Path], out: Path, context: StageContext) -> str:
        (out / "heldout.jsonl").write_text("text" if config.heldout_fraction else "")
        return "corpus"

    def tokenizer(self, config: Any, inputs: Mapping[str, Path], out: Path, context: StageContext) -> str:
        write_json(out / "results.json", {"vocab_size": 300})  # the text had fewer words than asked for
        return "words"

    def base(self, config: Any, inputs: Mapping[str, Path], out: Path, context: StageContext) -> str:
        if len(self.trained) == self.fail_at:
            raise OSError("the disk is gone")
        self.trained.append(config)
        shape = config.model.to_llama(300)
        tokens = config.train.steps * config.train.batch_tokens
        weights = parameter_count(shape) - 300 * shape.dim
        flops = 6 * tokens * (weights + shape.n_layers * shape.dim * config.train.seq_len)
        loss = 2 + 50 * flops**-0.15 + 0.03 * np.log(tokens / BEST(flops)) ** 2
        result = {"tokens": tokens, "supervised_tokens": tokens, "parameters": parameter_count(shape), "epochs": 1.5}
        write_json(out / "result.json", result | {"heldout_loss": float(loss), "stage_seconds": 1.0})
        return "trained"


def test_a_ladder_is_trained_once_goes_on_and_its_table_gives_the_law(tmp_path: Path) -> None:
    shop, config, said = _Workshop(), LadderConfig(budgets=BUDGETS, sizes=4), []
    shop.fail_at = 7
    with pytest.raises(StageFailed, match=r"the disk is gone.*herd again goes on"):
        run_ladder(RECIPE, config, shop.table(), tmp_path / "run", command="herd again")
    assert len(read_runs(tmp_path / "run" / LADDER_FILE)) == 7
    shop.fail_at = None
    rows = run_ladder(
        RECIPE,
        config,
        shop.table(),
        tmp_path / "run",
        command="herd again",
        on_rung=lambda rung, row: said.append((rung.name, row is not None)),
    )
    assert len(shop.trained) == len(rows) == 12  # seven and five: none twice
    assert said[:2] == [(rows[0]["name"], False), (rows[0]["name"], True)] and len(said) == 24
    assert run_ladder(RECIPE, config, shop.table(), tmp_path / "run", command="") == rows and len(shop.trained) == 12

    for row, rung in zip(rows, plan_ladder(RECIPE, config, vocab_size=300), strict=True):
        assert row["flops"] == pytest.approx(rung.flops) and row["tokens"] == rung.tokens
        assert (tmp_path / "run" / row["directory"] / "result.json").is_file()
    fit = fit_ladder(read_runs(tmp_path / "run" / LADDER_FILE))
    assert fit.tokens.exponent == pytest.approx(BEST.exponent, abs=0.02)  # budgets are met to within a step
    assert fit.predict(1e13).tokens.value == pytest.approx(BEST(1e13), rel=0.1)

    trained = shop.trained[0]
    assert trained.max_minutes is None and trained.seed == 5 and trained.train.optimizer == "muon"
    assert trained.model.rope_theta == 2e4 and trained.model.context_length == 128
    smaller, larger = shop.trained[0], shop.trained[3]
    assert smaller.train.lr > larger.train.lr and smaller.train.muon_lr == pytest.approx(2 * smaller.train.lr, rel=1e-3)
    assert smaller.train.micro_batch == smaller.train.batch_size < 16


def test_ladders_need_heldout_text_and_the_stages(tmp_path: Path) -> None:
    shop, config = _Workshop(), LadderConfig(budgets=BUDGETS)
    stages = {**RECIPE.stages, "corpus": {"sources": ["python-stdlib"], "heldout_fraction": 0}}
    with pytest.raises(UsageError, match=r"held-out text.*corpus.heldout_fraction=0.04"):
        run_ladder(Recipe("a", stages), config, shop.table(), tmp_path, command="")
    assert not shop.trained
    with pytest.raises(UsageError, match="needs the stage 'base'"):
        plan_ladder(Recipe("a", {"corpus": {}, "tokenizer": {}}), config)
    rung = plan_ladder(RECIPE, config)[0]
    assert rung.shape.vocab_size == 320 and list(rung_recipe(RECIPE, rung).stages) == ["corpus", "tokenizer", "base"]


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"phases": [{"from_tokens": 10_000, "seq_len": 128, "batch_size": 4}]}, "rows of one length"),
        ({"train": {"warmup": 8000}}, "warmup is for a longer run"),
        ({"train": {"anneal": 8000, "steps": 9000}}, "anneal is for a longer run"),
    ],
)
def test_what_steps_of_a_ladder_cannot_be(fields: dict[str, Any], said: str) -> None:
    base = RECIPE.stages["base"]
    changed = base | fields | {"train": base["train"] | fields.get("train", {})}
    with pytest.raises(UsageError, match=said):
        plan_ladder(Recipe("a", RECIPE.stages | {"base": changed}), LadderConfig(budgets=BUDGETS))


def test_every_rung_has_a_schedule_of_its_own_length() -> None:
    base = RECIPE.stages["base"]
    longer = Recipe("a", RECIPE.stages | {"base": base | {"train": base["train"] | {"schedule_steps": 10**6}}})
    for rung in plan_ladder(longer, LadderConfig(budgets=BUDGETS)):
        assert rung_recipe(longer, rung).stages["base"]["train"]["schedule_steps"] is None


def _herd(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "ladder.csv"
    lines = ["flops,params,tokens,loss"]
    for flops in BUDGETS:
        for ratio in (0.3, 0.8, 2, 4):
            tokens = BEST(flops) * ratio
            lines.append(f"{flops},{flops / 6 / tokens},{tokens},{2 + 50 * flops**-0.15 + 0.03 * np.log(ratio) ** 2}")
    file.write_text("\n".join(lines))
    return file


def test_verbs_speak_json_and_text(capsys: pytest.CaptureFixture[str], table: Path, repository: Path) -> None:
    png = table.with_suffix(".png")
    code, out, _ = _herd(capsys, "scaling", "fit", str(table), "--plot", str(png), "--json")
    assert code == 0 and json.loads(out)["laws"]["tokens"]["exponent"]["value"] == pytest.approx(0.5)
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000
    assert "tokens  A · C^α       1.5" in _herd(capsys, "scaling", "fit", str(table))[1]
    _, out, _ = _herd(capsys, "scaling", "predict", str(table), "--flops", "1e13,1e14", "--json")
    assert [row["tokens"]["value"] for row in json.loads(out)] == pytest.approx([BEST(1e13), BEST(1e14)])
    assert "16.3T   389B" in _herd(capsys, "scaling", "predict", "--law", "0.299,0.537", "--flops", "3.8e25")[1]
    pocket = str(repository / "recipes" / "pocket.yaml")
    _, out, _ = _herd(capsys, "scaling", "plan", pocket, "--budgets", "1e15,3e15,1e16", "--sizes", "4", "--json")
    rungs = json.loads(out)
    assert len(rungs) == 12 and rungs[0]["stages"]["base"]["train"]["steps"] == rungs[0]["steps"]
    models = table.with_name("arc.csv")
    models.write_text("flops,nll,accuracy\n1e20,1.4,0.3\n1e21,1.36,0.4\n1e22,1.33,0.52\n,1.3,0.6\n")
    _, out, _ = _herd(capsys, "scaling", "forecast", str(models), "--flops", "1e24", "--chance", "0.25", "--json")
    assert 0.6 < json.loads(out)["forecasts"][0]["accuracy"]["value"] < 0.8
    assert "scaling predict" in _herd(capsys, "scaling")[1] and "scaling fit" in _herd(capsys, "scaling", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--flops", "1e3"], "either a ladder or --law"),
        (["predict", "a.csv", "--law", "1,2", "--flops", "1e3"], "either a ladder or --law"),
        (["predict", "--law", "1,x", "--flops", "1e3"], "--law is no pair A,ALPHA; got 1,x"),
        (["predict", "--law", "1,1", "--flops", "1e3,nan"], "--flops is no list of FLOPs"),
        (["plan", "--budgets", "ten"], "--budgets is no list of FLOPs; got ten"),
        (["fit", "a.csv", "--plot", "nowhere/a.png"], "--plot cannot be written there"),
        (["forecast", "a.txt", "--flops", "1e3"], "no table of runs"),
    ],
)
def test_wrong_use_is_told(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = _herd(capsys, "scaling", *arguments)
    assert code == 2 and message in err and not out


def test_two_budgets_have_no_floor_and_it_is_said(capsys: pytest.CaptureFixture[str], table: Path) -> None:
    said = "has no floor and may be too low beyond them"
    for verb in (["fit"], ["predict", "--flops", "1e14"]):
        assert said not in _herd(capsys, "scaling", *verb, str(table))[1]
    assert json.loads(_herd(capsys, "scaling", "predict", str(table), "--flops", "1e14", "--json")[1])[0]["has_floor"]
    two = table.with_name("two.csv")
    two.write_text("\n".join(line for line in table.read_text().split("\n") if not line.startswith(str(BUDGETS[-1]))))
    fitted = _herd(capsys, "scaling", "fit", str(two))[1]
    assert said in fitted and "E = 0, not fitted" in fitted
    law = json.loads(_herd(capsys, "scaling", "fit", str(two), "--json")[1])["laws"]["loss"]
    assert law["floor"] == {"value": 0.0, "low": None, "high": None} and law["exponent"]["low"] is not None
    assert said in _herd(capsys, "scaling", "predict", str(two), "--flops", "1e14")[1]
    assert said not in _herd(capsys, "scaling", "predict", str(two), "--flops", str(BUDGETS[1]))[1]  # not beyond
    row = json.loads(_herd(capsys, "scaling", "predict", str(two), "--flops", "1e14", "--json")[1])[0]
    assert row["has_floor"] is False


def test_fit_predict_and_plan_need_no_torch(table: Path, repository: Path) -> None:
    pocket = repository / "recipes" / "pocket.yaml"
    for verb in (f"'fit', {str(table)!r}", f"'plan', {str(pocket)!r}, '--budgets', '1e15,1e16'"):
        code = f"import sys; sys.modules['torch'] = None\nfrom herd.cli import main; main(['scaling', {verb}])"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
