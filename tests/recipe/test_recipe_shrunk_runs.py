"""Every recipe that ships, run for real as its small copy, with the runs it begins with before it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from herd import model, tokenizer
from herd.corpus import TokenShards
from herd.pretrain.config import PretrainConfig
from herd.pretrain.rows import stretches
from herd.recipe import load_recipe, run, stage_table
from herd.recipe.shape import ModelShape
from tests.recipe.published import NAMES, recipes_at

QUICK = ("llama1-7b", "llama3.1-405b", "llama4-maverick")
"""Seven sources; rows and steps that grow; mixtures of experts with NoPE layers and chunks."""
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it, with some 300 kB of text: modules of the standard library of all letters, and the
    beginnings of others, short enough to be infilled."""
    folder = recipes_at(tmp_path_factory.mktemp("project"))
    (folder / "text").mkdir()
    taken: dict[str, int] = {}
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        small = 2_000 < file.stat().st_size < 16_000
        if small and taken.get(file.name[0], 0) < 3:
            taken[file.name[0]] = taken.get(file.name[0], 0) + 1
            shutil.copy(file, folder / "text")
        else:
            (folder / "text" / f"{file.stem}_begins.py").write_bytes(file.read_bytes()[:400])
    return folder


@pytest.fixture
def run_small(project: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a small copy, after those that it begins with; (its recipe's stages, directory of its base stage)."""
    monkeypatch.chdir(project)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small gain nothing from two, and wait for each other on a busy machine

    def small(name: str) -> tuple[dict[str, Any], Path]:
        recipe = load_recipe(name, shrink=True, text="text")
        directory = Path("runs") / recipe.name
        for other in re.findall(r"runs/([^/'\"]+)-shrunk", json.dumps(dict(recipe.stages))):
            if not (Path("runs") / f"{other}-shrunk" / "run.json").exists():
                small(other)
        for stage in Path("runs").glob("*/corpus-*"):  # the corpus is the same everywhere
            if not directory.exists():
                shutil.copytree(stage, directory / stage.name)
        state = run(recipe, stage_table(), directory)
        return dict(recipe.stages), directory / state["stages"]["base"]["directory"]

    yield small
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", EACH)
def test_a_small_copy_runs_to_its_end(name: str, run_small: Any) -> None:
    stages, base = run_small(name)
    values = {field: value for field, value in stages["base"].items() if field in PretrainConfig.model_fields}
    config = PretrainConfig.model_validate(values)
    result = json.loads((base / "result.json").read_text())
    rows = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert result["steps"] == config.train.steps == len(losses) and all(map(math.isfinite, losses))
    assert math.isfinite(result["heldout_bits_per_byte"])
    assert losses[-1] < losses[0] or config.train.lr < 1e-4
    happened = [(phase["seq_len"], phase["batch_size"]) for phase in result["phases"]]
    assert happened == [(size.seq_len, size.batch_size) for size in (config.train, *config.phases)]
    _sources_have_their_shares(config, result)
    rates = [row["lr"] for row in rows if "loss" in row]
    assert (rates[-1] == 0) is bool(config.train.anneal or not config.train.final_lr_ratio)
    assert max(rates) == pytest.approx(config.train.lr, rel=1e-6)
    found = model.load(base / "checkpoint")
    words = tokenizer.load(base / "checkpoint")
    assert found.config == ModelShape(**stages["base"]["model"]).to_llama(words.vocab_size)
    assert all(parameter.isfinite().all() for parameter in found.parameters())
    for source, entry in config.sources.items():
        shards = TokenShards(base / "tokens" / f"train-{source}")
        mark, most = words.specials.get("▁<PRE>", -1), config.longest_row + 1
        marked = [bool((document == mark).any()) for document in shards]
        short = [length <= most for length in shards.lengths.tolist()]
        assert not any(m for m, fits in zip(marked, short, strict=True) if not fits), "rows would cut them"
        if entry.infilling:
            assert sum(short) >= 5 and sum(marked) >= 0.6 * sum(short), "nine in ten, of a few"
        else:
            assert not any(marked)


def _sources_have_their_shares(config: PretrainConfig, result: dict[str, Any]) -> None:
    """Rows of each source are those that the weights of each stretch give, to within a row or two of each."""
    if not config.sources:
        return
    parts, total = stretches(config), config.sizes().rows_before(config.train.steps)
    for source in config.sources:
        wanted = 0.0
        for part, end in zip(parts, [*(part.first for part in parts[1:]), total], strict=True):
            wanted += (end - part.first) * part.weights.get(source, 0) / sum(part.weights.values())
        assert abs(result["sources"][source]["rows"] - wanted) <= 2 * len(parts), source


@pytest.mark.slow
def test_a_pruned_student_begins_with_what_its_parent_knows(run_small: Any) -> None:
    _, base = run_small("llama3.2-3b")
    result = json.loads((base / "result.json").read_text())
    assert result["teachers"] == ["runs/llama3.1-long-8b-shrunk", "runs/llama3.1-long-70b-shrunk"]
    adapted = model.load(base / "adapted")
    parent = json.loads(Path("runs/llama3.1-long-8b-shrunk/run.json").read_text())["model"]
    whole = model.load(Path("runs/llama3.1-long-8b-shrunk") / parent)
    assert (whole.config.n_layers, adapted.config.n_layers) == (4, 3)
    assert (whole.config.dim, adapted.config.dim, adapted.config.n_heads) == (64, 48, 6)
    columns = {tuple(column) for column in whole.embed.weight.T.tolist()}
    assert all(tuple(column) in columns for column in adapted.embed.weight.T.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("name, ranks", [("llama3.1-405b", 4), ("llama4-maverick", 2)])
def test_a_small_copy_on_several_ranks_is_the_same_run(name: str, ranks: int, project: Path) -> None:
    """405B: tensor and pipeline parallel, interleaved. Maverick: tensor parallel."""

    def result(ranks: int) -> dict[str, Any]:
        out = f"runs/{name}-on-{ranks}"
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
        command = [sys.executable, "-m", *launch, "herd", "run", name, "--shrink", "--text", "text", "--out", out]
        done = subprocess.run(
            [*command, "base.train.precision=fp32"],
            cwd=project,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        state = json.loads((project / out / "run.json").read_text())
        read: dict[str, Any] = json.loads(
            (project / out / state["stages"]["base"]["directory"] / "result.json").read_text()
        )
        return read

    alone, together = result(1), result(ranks)
    assert together["steps"] == 12 and together["phases"] == alone["phases"]
    for figure in ("loss", "heldout_loss"):
        assert together[figure] == pytest.approx(alone[figure], rel=1e-4), figure
