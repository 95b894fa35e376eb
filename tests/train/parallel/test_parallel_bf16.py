"""In bf16, with several micro-batches a rank, many ranks give the gradients of one process, as nearly as bf16 tells.

The matrix is in fp32, where nothing is cast: a cast that is kept while the weight behind it changes shows only here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.parallel.cases import Case, Seen, trainer
from tests.train.parallel.launch import launch

pytest.importorskip("torch.distributed")

CASES = [
    Case("dense", 2, {"shard": True}),
    Case("dense", 2, {"shard": True, "reduce_each": False}),
    Case("dense", 2, {"shard": True, "reshard": True, "recompute": "full"}),
    Case("dense", 2, {"shard": True, "recompute": "selective"}),
    Case("dense", 2, {"cp": 2}),
    Case("dense", 2, {"tp": 2}),
    Case("tied", 2, {"pp": 2}),
    Case("moe", 2, {"ep": 2}),
]
NEAR = 0.02
"""Of a gradient's length. Rounding is 0.0024 of it to 0.008; one micro-batch left out is 0.3 and more."""


def first_step(case: Case, out: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step, four micro-batches of two rows in all."""
    seen = Seen()
    trainer(case, out, [seen], precision="bf16").train_step()
    loss, _, _, gradients = seen.steps[0]
    return loss, gradients


def on_a_rank(rank: int, out: Path) -> None:
    for number, case in enumerate(CASES):
        result = first_step(case, out / f"run{number}")
        torch.save(result, out / f"{number}-{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bf16")
    launch(2, "tests.train.parallel.test_parallel_bf16:on_a_rank", out)
    return out


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_bf16_on_ranks_is_that_of_one_process(results: Path, tmp_path: Path, number: int) -> None:
    case = CASES[number]
    loss, gradients = first_step(Case(case.model, 1, {}), tmp_path)
    found = [torch.load(results / f"{number}-{rank}.pt") for rank in range(2)]
    assert found[0][0] == pytest.approx(loss, rel=1e-3)
    for name, expected in gradients.items():
        for _, theirs in found:
            if name in theirs:  # a pipeline rank has its own layers
                assert (theirs[name] - expected).norm() < NEAR * expected.norm(), name
    assert set(gradients) <= set(found[0][1]) | set(found[1][1])


@pytest.mark.parametrize(("what", "runs"), [("none", 1), ("full", 2)])
def test_one_process_computes_again_what_it_is_told_to(tmp_path: Path, what: str, runs: int) -> None:
    loop = trainer(Case("dense", 1, {"recompute": what}), tmp_path, [], micro_batch=8)
    calls = []
    loop.model.layers[0].attention_norm.register_forward_pre_hook(lambda *_: calls.append(1))
    loop.train_step()
    assert len(calls) == runs
