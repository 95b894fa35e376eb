"""`torchrun -m herd run`: the recipe of one process on many ranks, through to a checkpoint that anybody loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from herd import checkpoint

RECIPE = """
name: tiny
seed: 0
stages:
  corpus: {sources: [%s], heldout_fraction: 0.1}
  tokenizer: {vocab_size: 400, n_specials: 16}
  base:
    model: {dim: 32, n_layers: 2, n_heads: 4, n_kv_heads: 2, ffn_dim: 64, context_length: 512, tied_embeddings: true}
    evaluations: 1
    probe_tokens: 1000
    train: {steps: 12, seq_len: 64, batch_size: 8, micro_batch: 2, precision: fp32, compile: "off", eps: 1.0e-6,
            checkpoint_every: 4, log_every: 4}
  sft:
    exercises: 200
    epochs: null
    train: {steps: 4, seq_len: 512, batch_size: 4, micro_batch: 2, precision: fp32, compile: "off", log_every: 2}
"""


def _run(
    recipe: Path, out: Path, ranks: int, *overrides: str, restarts: int = 0, **env: str
) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    torchrun += [f"--max-restarts={restarts}", "-m"]
    command = [*(torchrun if ranks > 1 else [sys.executable, "-m"]), "herd", "run", str(recipe), *overrides]
    return subprocess.run(
        [*command, "--out", str(out), "--json"],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )


def _lines(out: Path, stage: str) -> list[dict[str, Any]]:
    (file,) = out.glob(f"{stage}-*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def _weights(out: Path, stage: str) -> dict[str, np.ndarray[Any, Any]]:
    (folder,) = out.glob(f"{stage}-*/checkpoint")
    with checkpoint.open_checkpoint(folder) as opened:
        return {name: np.array(opened[name]) for name in opened}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    texts = folder / "texts"
    texts.mkdir()
    for module in (json, subprocess):
        source = Path(module.__file__)
        (texts / f"{module.__name__}.py").write_text(source.read_text())
    path = folder / "tiny.yaml"
    path.write_text(RECIPE % texts)
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    out = recipe.parent / "alone"
    done = _run(recipe, out, 1)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    "split",
    [
        ["parallel.pp=2"],
        pytest.param(["parallel.shard=true"], marks=pytest.mark.slow),
        pytest.param(["parallel.tp=2"], marks=pytest.mark.slow),
        pytest.param(["parallel.cp=2"], marks=pytest.mark.slow),
        pytest.param([], marks=pytest.mark.slow),
    ],
    ids=lambda split: split[0] if split else "dp",
)
def test_ranks_make_the_checkpoint_of_one_process(split: list[str], recipe: Path, alone: Path, tmp_path: Path) -> None:
    done = _run(recipe, tmp_path, 2, *(f"{stage}.train.{field}" for field in split for stage in ("base", "sft")))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stages"].keys() >= {"base", "sft"}, "one rank prints its result"
    assert done.stderr.count("▸ base") == 1, "one rank speaks"
    for stage in ("base", "sft"):
        for mine, theirs in zip(_lines(tmp_path, stage), _lines(alone, stage), strict=True):
            for key in mine.keys() & {"loss", "heldout_loss", "grad_norm", "tokens"}:
                assert mine[key] == pytest.approx(theirs[key], rel=2e-4), key
        found, expected = _weights(tmp_path, stage), _weights(alone, stage)
        assert found.keys() == expected.keys()
        assert all(np.allclose(found[name], expected[name], atol=1e-4) for name in expected)
    again = _run(recipe, tmp_path, 1)
    assert again.returncode == 0 and "– base" in again.stderr, "how ranks share the work does not change the result"


DUALPIPEV = ["parallel.pp=2", "parallel.virtual=2", "parallel.schedule=dualpipev", "micro_batch=4"]


@pytest.mark.parametrize(
    "split, said",
    [
        (["parallel.tp=4"], "the ranks cannot be shared between the axes"),
        pytest.param(DUALPIPEV, "needs 4 micro-batches of a step or more, not 2", marks=pytest.mark.slow),
    ],
    ids=["tp", "dualpipev"],
)
def test_a_layout_that_does_not_fit_says_so_once(split: list[str], said: str, recipe: Path, tmp_path: Path) -> None:
    done = _run(recipe, tmp_path, 2, *(f"base.train.{field}" for field in split))
    assert done.returncode != 0
    assert done.stderr.count(said) == 1
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
    assert not list(tmp_path.glob("base-*/state")), "nothing was trained"
