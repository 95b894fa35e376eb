"""`herd scaling run` with the real trainer: a ladder of six tiny models, trained once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from herd.cli import main
from herd.pretrain.scaling import read_runs


def test_six_tiny_models_are_trained_and_then_kept(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources, run_dir = tmp_path / "sources", tmp_path / "run"
    shutil.copytree(Path(sysconfig.get_path("stdlib"), "json"), sources)
    given = [str(repository / "tests/recipe/tiny.yaml"), f"corpus.sources=['{sources}']", "tokenizer.vocab_size=300"]
    given += ["base.train.seq_len=64", "base.evaluations=0", "--budgets=6e8,1.2e9", "--sizes=3", "--ratio=1"]
    printed = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            main(["scaling", "run", *given, "--out", str(run_dir), "--json"])
        assert not stop.value.code
        printed.append(json.loads(capsys.readouterr().out))
        manifests = {file: file.stat().st_mtime_ns for file in run_dir.glob("base-*/stage.json")}
    assert printed[0] == printed[1] and len(manifests) == 6
    assert all(file.stat().st_mtime_ns == time for file, time in manifests.items())
    runs = read_runs(run_dir / "ladder.jsonl")
    assert [run.flops for run in runs] == pytest.approx([6e8] * 3 + [1.2e9] * 3, rel=0.1)
    assert [vars(run) for run in runs] == [{key: row[key] for key in vars(runs[0])} for row in printed[0]]
    assert all(2 < run.loss < 6 for run in runs)  # ln 300 = 5.7 before anything is learnt
    assert runs[3].params == runs[0].params and runs[3].loss < runs[0].loss  # the same model, trained longer


@pytest.mark.slow
def test_two_ranks_train_the_ladder_of_one_process(tmp_path: Path, repository: Path) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(Path(sysconfig.get_path("stdlib"), "json"), sources)
    given = [str(repository / "tests/recipe/tiny.yaml"), f"corpus.sources=['{sources}']", "tokenizer.vocab_size=300"]
    given += ["base.train.seq_len=64", "base.evaluations=0", "base.train.micro_batch=1", "base.train.precision=fp32"]
    given += ["--budgets=6e8,1.2e9", "--sizes=3", "--ratio=1", "--json"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = []
    for name, launcher, more in (("one", [], []), ("two", torchrun, ["base.train.parallel.cp=2"])):
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "herd", "scaling", "run", *given, *more, "--out", str(tmp_path / name)],
            capture_output=True,
            text=True,
            timeout=280,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout))
        assert len((tmp_path / name / "ladder.jsonl").read_text().splitlines()) == 6
    for one, two in zip(*found, strict=True):
        assert (one["name"], one["tokens"], one["params"]) == (two["name"], two["tokens"], two["params"])
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
