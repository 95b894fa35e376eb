"""A rank that dies, hangs or cannot write costs one save interval at most: torchrun starts all again and they go on."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from herd import checkpoint
from tests.train.parallel.test_parallel_torchrun import RECIPE

STEPS, EVERY = 300, 20


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "texts").mkdir()
    (folder / "texts/one.py").write_text(Path(json.__file__).read_text() + Path(subprocess.__file__).read_text())
    path = folder / "faults.yaml"
    path.write_text(RECIPE % (folder / "texts"))
    return path


ONE_NODE = ["--standalone", "--nproc-per-node=2"]


def _start(recipe: Path, out: Path, nodes: Sequence[str] = ONE_NODE, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *nodes, "--max-restarts=3"]
    fields = {"steps": STEPS, "checkpoint_every": EVERY, "log_every": 1, "parallel.shard": "true"}
    changed = [f"base.train.{name}={value}" for name, value in fields.items()]
    return subprocess.Popen(
        [*command, "-m", "herd", "run", str(recipe), "sft=false", *changed, "--out", str(out), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HERD_RANK_TIMEOUT": "8", **env},
    )


def _ranks(launcher: int) -> list[int]:
    """Processes that the launcher has started, by rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for entry in environment:
            if entry.startswith(b"RANK="):
                found[int(entry[5:])] = int(child)
    return [found[rank] for rank in sorted(found)]


def _steps(out: Path) -> list[int]:
    files = list(out.glob("base-*/metrics.jsonl"))
    lines = [json.loads(line) for line in files[0].read_text().splitlines()] if files else []
    return [line["step"] for line in lines if "loss" in line]


def _run(
    recipe: Path,
    out: Path,
    fault: Callable[[subprocess.Popen[str]], None] | None,
    said: str = "",
    nodes: Sequence[str] = ONE_NODE,
    **env: str,
) -> dict[str, bytes]:
    process, reached = _start(recipe, out, nodes, **env), 0
    try:
        if fault is not None:
            while (reached := max(_steps(out), default=0)) < 2 * EVERY:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.02)
            fault(process)
        _, errors = process.communicate(timeout=280)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    assert sorted(set(_steps(out))) == _steps(out) and _steps(out)[-1] == STEPS
    assert said in errors
    if fault is not None:
        (result,) = out.glob("base-*/result.json")
        assert json.loads(result.read_text())["resumed_from"] >= reached - EVERY
    (folder,) = out.glob("base-*/checkpoint")
    with checkpoint.open_checkpoint(folder) as opened:
        return {name: opened[name].tobytes() for name in opened}


@pytest.fixture(scope="module")
def expected(recipe: Path) -> dict[str, bytes]:
    return _run(recipe, recipe.parent / "whole", None)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(rank: int, recipe: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    found = _run(recipe, tmp_path, lambda launcher: os.kill(_ranks(launcher.pid)[rank], signal.SIGKILL))
    assert found == expected


@pytest.mark.slow
def test_a_rank_that_hangs(recipe: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    found = _run(recipe, tmp_path, lambda launcher: os.kill(_ranks(launcher.pid)[1], signal.SIGSTOP))
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write(rank: int, recipe: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """As on a full disk, what a rank writes ends in the middle; the restarted ranks have room again."""

    def fault(launcher: subprocess.Popen[str]) -> None:
        resource.prlimit(_ranks(launcher.pid)[rank], resource.RLIMIT_FSIZE, (4096, 4096))

    found = _run(recipe, tmp_path, fault, os.strerror(errno.EFBIG))
    assert found == expected


@pytest.mark.slow
def test_a_node_that_is_replaced(recipe: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """The new one counts its restarts from 0, the other one has counted one. PyTorch 2.13 tells it where their store is
    only if that is not torchrun's own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=1"]
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    others = []

    def replaced(launcher: subprocess.Popen[str]) -> None:
        for process in (*_ranks(others[0].pid), others[0].pid):
            os.kill(process, signal.SIGKILL)
        others[0].communicate()
        others.append(_start(recipe, tmp_path, nodes, **env))

    def second() -> None:
        time.sleep(2)  # the first node has the store
        others.append(_start(recipe, tmp_path, nodes, **env))

    starting = threading.Thread(target=second)
    starting.start()
    try:
        found = _run(recipe, tmp_path, replaced, "", nodes, **env)
    finally:
        starting.join()
        for other in others:
            if other.poll() is None:
                os.killpg(other.pid, signal.SIGKILL)
    assert found == expected


@pytest.mark.slow
def test_the_machine_takes_all_away_and_gives_them_back(
    recipe: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    def end(launcher: subprocess.Popen[str]) -> None:
        os.killpg(launcher.pid, signal.SIGTERM)

    process = _start(recipe, tmp_path)
    while max(_steps(tmp_path), default=0) < 2 * EVERY:
        time.sleep(0.02)
    end(process)
    process.communicate(timeout=60)
    saved = max(int(path.name[5:]) for path in tmp_path.glob("base-*/state/step-*"))
    assert saved >= max(_steps(tmp_path), default=0) - EVERY
    assert _run(recipe, tmp_path, None) == expected
