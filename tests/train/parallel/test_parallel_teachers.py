"""Teachers whose weights are sharded teach what whole ones do, and each rank keeps its part of them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from herd import checkpoint
from herd.model import Llama, state_arrays
from herd.train.distillation import Distillation, load_teacher
from herd.train.parallel import ParallelConfig
from herd.train.world import current_world
from tests.train.parallel.cases import MODELS, STEPS, VOCABULARY, Case, Seen, shape, trainer
from tests.train.parallel.launch import launch

TEACHERS = {"larger": shape(dim=96, n_layers=3, head_dim=24), "moe": MODELS["moe"]}
SPLIT = {"shard": True}


def taught(rank: int, out: Path, folder: str, parallel: dict[str, Any], ranks: int) -> None:
    """Three steps with both teachers, and how many of their numbers this rank has before and after them."""
    config, device = ParallelConfig(**parallel), torch.device("cpu")
    world = current_world(config)
    teachers = [load_teacher(Path(folder) / name, world, device, torch.float32) for name in TEACHERS]
    held = [_held(teachers)]
    seen = Seen()
    loop = trainer(
        Case("dense", ranks, parallel), out / str(ranks), [seen], Distillation(teachers, 0.5, VOCABULARY, config)
    )
    for _ in range(STEPS):
        loop.train_step()
    held.append(_held(teachers))
    torch.save((held, seen.steps), out / f"{ranks}-{rank}.pt")


def _held(models: list[Llama]) -> int:
    parts = (p.to_local() if hasattr(p, "to_local") else p for model in models for p in model.parameters())
    return sum(part.numel() for part in parts)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    for seed, (name, config) in enumerate(TEACHERS.items(), 1):
        model = Llama(config)
        model.init_weights(seed)
        checkpoint.save(folder / name, config, state_arrays(model), format="hf", dtype="f32")
    return folder


def test_sharded_teachers_teach_what_whole_ones_do(teachers: Path, tmp_path: Path) -> None:
    taught(0, tmp_path, str(teachers), {}, 1)
    launch(
        2, "tests.train.parallel.test_parallel_teachers:taught", tmp_path, folder=str(teachers), parallel=SPLIT, ranks=2
    )
    whole, expected = torch.load(tmp_path / "1-0.pt")
    for rank in range(2):
        held, steps = torch.load(tmp_path / f"2-{rank}.pt")
        assert held == [pytest.approx(number / 2, rel=0.01) for number in whole]
        for (l1, n1, t1, g1), (l0, n0, t0, g0) in zip(steps, expected, strict=True):
            assert t1 == t0 and l1 == pytest.approx(l0, rel=1e-6) and n1 == pytest.approx(n0, rel=1e-5)
            for name, found in g1.items():
                assert (found - g0[name]).norm() < 1e-5 * g0[name].norm(), name
