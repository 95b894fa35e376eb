"""What the loop asks of its ranks, on meshes of several axes: the same answer everywhere, and the whole weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from herd.model import Llama
from herd.train.budget import TimeLimit
from tests.train.parallel.cases import MODELS, Case, trainer
from tests.train.parallel.launch import launch

HERE = "tests.train.parallel.test_parallel_world"


def ask(rank: int, out: Path, model: str, parallel: dict[str, Any]) -> None:
    """Every question of one rank, each checked against what is known beforehand."""
    limit = TimeLimit(3600, out / "plan.json", started=time.monotonic())
    loop = trainer(Case(model, 4, parallel), out / "run", [limit], steps=6, spike_factor=0)
    world = loop.world
    assert world.from_first([float(rank), 7.0 + rank]) == [0.0, 7.0]
    assert world.from_first([1.0] * (3 - rank)) == [1.0] * 3, "others may have other lengths"
    assert world.any(rank == 3) and not world.any(False)
    assert world.largest(rank) == 3
    mine = torch.ones(1)
    world.sum_([mine])
    assert mine.item() == 4 // parallel.get("tp", 1), "TP ranks have the same losses"

    whole = Llama(MODELS[model])
    whole.init_weights(0)
    expected = dict(whole.named_parameters())
    found = dict(world.whole_weights(loop.model))
    assert found.keys() == (expected.keys() if rank == 0 else set())
    assert all(torch.equal(found[name], expected[name]) for name in found)

    batches = loop.source.batch(0)
    loss, weight = loop.evaluate(batches)
    torch.save([loss, weight], out / f"evaluated-{rank}.pt")
    limit._started = limit._started + 1e9 * rank  # the other ranks' clocks are elsewhere
    limit.on_start(loop)
    torch.save(loop.total_steps, out / f"planned-{rank}.pt")


@pytest.mark.parametrize(
    "model, parallel",
    [
        ("tied", {"tp": 2, "pp": 2}),
        pytest.param("tied", {"pp": 2, "virtual": 2, "schedule": "zbv", "shard": True}, marks=pytest.mark.slow),
        pytest.param("moe", {"ep": 2, "cp": 2}, marks=pytest.mark.slow),
        pytest.param("dense", {"tp": 2, "shard": True}, marks=pytest.mark.slow),
    ],
    ids=["tp pp", "zbv fsdp", "ep cp", "tp fsdp"],
)
def test_all_ranks_hear_the_same(model: str, parallel: dict[str, Any], tmp_path: Path) -> None:
    launch(4, f"{HERE}:ask", tmp_path, model=model, parallel=parallel)
    dp = 4 // (parallel.get("tp", 1) * parallel.get("cp", 1) * parallel.get("pp", 1))
    alone = trainer(Case(model, 1, {}), tmp_path / "alone", [])
    whole = alone.evaluate(alone.source.batch(0))
    evaluated = [torch.load(tmp_path / f"evaluated-{rank}.pt") for rank in range(4)]
    for part in range(2):  # DP ranks were given their own share of the rows
        assert sum(rank[part] for rank in evaluated) * dp / 4 == pytest.approx(whole[part], rel=1e-5)
    assert len({torch.load(tmp_path / f"planned-{rank}.pt") for rank in range(4)}) == 1
