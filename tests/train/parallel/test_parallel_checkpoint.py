"""A run's state outlives its mesh: other ranks, split otherwise, continue it; and it outlives `kill -9`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from herd.errors import HerdError
from tests.train.parallel.cases import Case, trainer
from tests.train.parallel.launch import launch

HERE = "tests.train.parallel.test_parallel_checkpoint"
CHAIN: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (4, {"tp": 2, "pp": 2}),
    (2, {"pp": 2, "virtual": 2, "schedule": "zbv"}),
    (1, {}),
]
LONG_CHAIN = [*CHAIN[:2], (4, {"cp": 2, "shard": True}), (2, {"shard": True}), (4, {"tp": 4}), *CHAIN[2:]]


def go_on(rank: int, out: Path, model: str, ranks: int, parallel: dict[str, Any], steps: int) -> None:
    """Train to `steps` from wherever the state in `out`/run is, and leave the weights and what was logged."""
    loop = trainer(Case(model, ranks, parallel), out / "run", [], steps=20, keep=50, average="ema", log_every=1)
    loop._resume()
    while loop.step < steps:
        loop.train_step()
    loop.save()
    weights = {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for name, p in loop.model.named_parameters()
    }
    if rank == 0 or parallel.get("pp", 1) > 1:
        torch.save(weights, out / f"weights-{rank}.pt")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As ranks have; afterwards as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "model, chain",
    [
        ("tied", CHAIN),
        pytest.param("tied", LONG_CHAIN, marks=pytest.mark.slow),
        pytest.param("moe", CHAIN, marks=pytest.mark.slow),
    ],
    ids=["tied", "tied and longer", "moe"],
)
@pytest.mark.usefixtures("one_thread")
def test_any_mesh_continues_from_any_other(model: str, chain: list[tuple[int, dict[str, Any]]], tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for number, (ranks, parallel) in enumerate(chain, start=1):
        go_on(0, alone, model, 1, {}, 2 * number)
        if ranks == 1:
            go_on(0, tmp_path, model, 1, parallel, 2 * number)
        else:
            arguments = {"model": model, "ranks": ranks, "parallel": parallel, "steps": 2 * number}
            launch(ranks, f"{HERE}:go_on", tmp_path, **arguments)
        expected = torch.load(alone / "weights-0.pt")
        found: dict[str, Tensor] = {}
        for rank in range(ranks):
            if (file := tmp_path / f"weights-{rank}.pt").exists():
                found |= torch.load(file)
                file.unlink()
        found.pop("output.weight", None)
        assert found.keys() == expected.keys()
        for name, weights in expected.items():
            assert torch.allclose(found[name], weights, atol=2e-6, rtol=1e-5), (number, name)
    assert (tmp_path / "run/state").is_dir()


@pytest.mark.slow
def test_a_damaged_part_takes_all_ranks_to_the_checkpoint_before(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"model": "dense", "ranks": 2, "parallel": {"shard": True}}
    launch(2, f"{HERE}:go_on", tmp_path, steps=2, **arguments)
    launch(2, f"{HERE}:go_on", tmp_path, steps=4, **arguments)
    expected = torch.load(tmp_path / "weights-0.pt")
    newest = tmp_path / "run/state/step-00000004"
    part = sorted(newest.glob("*.safetensors"))[-1]
    content = bytearray(part.read_bytes())
    content[-3] ^= 1
    part.write_bytes(content)
    launch(2, f"{HERE}:go_on", tmp_path, steps=4, **arguments)
    found = torch.load(tmp_path / "weights-0.pt")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def cannot_write(rank: int, out: Path) -> None:
    """Rank 1's part cannot be written: no rank goes on as if it had been, and the older checkpoint stays."""
    loop = trainer(Case("dense", 2, {"shard": True}), out / "run", [], steps=20)
    loop._resume()
    loop.train_step()
    write, names = loop.world.write_tensors, sorted(path.name for path in loop.store.path(0).glob("*.safetensors"))

    def full(directory: Path, tensors: dict[str, Tensor]) -> None:
        if rank == 1:
            (directory / names[1]).symlink_to("/dev/full")
        write(directory, tensors)

    def full_behind(directory: Path, tensors: dict[str, Tensor]) -> None:
        write(directory, tensors)
        if rank == 1:
            raise OSError(28, "No space left on device")

    said = "rank 1 could not write its part of the checkpoint: No space left on device"
    for fault, expected in ((full, [said, said]), (full_behind, ["another rank could not", "No space left"])):
        loop.world.write_tensors = fault  # type: ignore[method-assign]
        try:
            loop.save()
        except (OSError, HerdError) as error:
            assert expected[rank] in str(error)
        else:
            raise AssertionError("it was said to be written")
        assert loop.store.steps() == [0]
    loop.world.write_tensors = write  # type: ignore[method-assign]
    loop.save()
    assert loop.store.steps() == [0, 1]
    (out / f"done-{rank}").touch()


def test_a_rank_without_space_stops_all_and_costs_no_older_checkpoint(tmp_path: Path) -> None:
    launch(2, f"{HERE}:cannot_write", tmp_path)
    assert (tmp_path / "done-0").exists() and (tmp_path / "done-1").exists()


def many_steps(rank: int, out: Path, steps: int) -> None:
    """A run that saves every second step, from wherever its state is."""
    # Random tokens teach nothing and spike at times: where a spike sends a run back to depends on when it was saved.
    fields = {"steps": steps, "checkpoint_every": 2, "log_every": 1, "spike_factor": 0}
    loop = trainer(Case("tied", 2, {"shard": True}), out / "run", [], **fields)
    loop.fit()
    weights = {name: p.full_tensor() for name, p in loop.model.named_parameters()}
    if rank == 0:
        torch.save(weights, out / "final.part")
        os.replace(out / "final.part", out / "final.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 50])
def test_kills_at_random_leave_the_final_weights_as_they_were(kills: int, tmp_path: Path) -> None:
    steps = 40 if kills == 2 else 400
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    launch(2, f"{HERE}:many_steps", whole, steps=steps)
    expected = torch.load(whole / "final.pt")
    rng, done, starts = random.Random(0), 0, 0
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.train.parallel.launch",
        "2",
        f"{HERE}:many_steps",
        str(killed),
    ]
    while not (killed / "final.pt").exists():
        process = subprocess.Popen(
            [*command, json.dumps({"steps": steps})],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        starts += 1
        assert starts < kills + 30
        if done < kills:
            # Wherever it is: starting, computing, writing, committing. The first checkpoint is there soon after 5 s.
            deadline = time.monotonic() + rng.uniform(4, 8)
            while time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.01)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                done += 1
        process.wait()
    assert done >= kills or (killed / "final.pt").exists()
    found = torch.load(killed / "final.pt")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    lines = [json.loads(line)["step"] for line in (killed / "run/metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines)), "no step is logged twice"
    print(f"\nsurvived {done} kills in {starts} starts")
