"""A step that goes wrong on one rank is left out on all of them, and the run ends with the same weights everywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from herd.train import Batch, Callback, StepRecord, Trainer, Verdict, next_token_loss
from herd.train.guard import WINDOW
from tests.train.parallel.cases import Case, trainer
from tests.train.parallel.launch import launch

HERE = "tests.train.parallel.test_parallel_bad_steps"
SETTINGS: dict[str, Any] = {
    "micro_batch": 4,
    "checkpoint_every": 10,
    "log_every": 1,
    "spike_factor": 50,
    "max_skips": 3,
}


class _Scale(torch.autograd.Function):
    """The numbers as they are, their gradient times something."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.factor, None


class Verdicts(Callback):
    """What became of the steps, by their data; and, where it is told to, what is to become of them."""

    def __init__(self, wanted: dict[int, int]) -> None:
        self.wanted, self.found = wanted, dict[int, int]()

    def on_gradients(self, trainer: Trainer[Any], record: StepRecord) -> Verdict:
        return Verdict(self.wanted.get(trainer.cursor - 1, Verdict.APPLY))

    def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
        self.found[trainer.cursor - 1] = int(record.verdict)


def go(rank: int, out: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Each run with its fault, and as it is when every rank is told what to do with those steps."""
    for name, fault in runs.items():
        bad, wanted = ({int(step): x for step, x in fault[key].items()} for key in ("bad", "wanted"))
        faulty = bad if rank == fault["on"] else {}
        _train(rank, out / f"{name}-fault", fault, faulty, {})
        _train(rank, out / f"{name}-told", fault, {}, wanted)


def _train(rank: int, out: Path, fault: dict[str, Any], bad: dict[int, float], wanted: dict[int, int]) -> None:
    """With the data of step `s` this rank has bad[s] times its gradient of the embedding's output, or its loss."""

    def loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        summed, weight = next_token_loss(model, batch)
        if fault["of"] == "loss":  # of the number alone: its gradient is as it was
            summed = summed + summed.detach() * (bad.get(loop.cursor, 1.0) - 1)
        return summed, weight

    seen = Verdicts(wanted)
    loop = trainer(Case("dense", 2, fault["parallel"]), out, [seen], loss, steps=fault["steps"], **SETTINGS)
    if fault["of"] == "gradient" and isinstance(loop.model.embed, nn.Embedding):  # a pipeline's first stage has it
        loop.model.embed.register_forward_hook(lambda module, _, x: _Scale.apply(x, bad.get(loop.cursor, 1.0)))
    loop.fit()
    weights = {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for name, p in loop.model.named_parameters()
    }
    torch.save({"weights": weights, "verdicts": seen.found, "cursor": loop.cursor}, out / f"end-{rank}.pt")


def _check(out: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Ranks with a fault do what ranks do that are told to, and end in the same weights, bit by bit."""
    launch(2, f"{HERE}:go", out, timeout=550, runs=runs)
    for name, fault in runs.items():
        for rank in range(2):
            found, told = (torch.load(out / f"{name}-{kind}/end-{rank}.pt") for kind in ("fault", "told"))
            assert found["cursor"] == told["cursor"], (name, rank)
            assert found["verdicts"] == told["verdicts"], (name, rank)
            for step, verdict in fault["wanted"].items():
                assert found["verdicts"].get(step, Verdict.ROLL_BACK) == verdict, (name, rank, step)
            assert found["weights"].keys() == told["weights"].keys()
            for weight, expected in told["weights"].items():
                assert torch.isfinite(expected).all() and torch.equal(found["weights"][weight], expected), (
                    name,
                    weight,
                )
        if "pp" not in fault["parallel"]:
            first, second = (torch.load(out / f"{name}-fault/end-{rank}.pt")["weights"] for rank in range(2))
            assert all(torch.equal(first[weight], second[weight]) for weight in first), name


def _nan(parallel: dict[str, Any], on: int, of: str = "gradient") -> dict[str, Any]:
    return {"parallel": parallel, "on": on, "of": of, "bad": {2: math.nan}, "wanted": {2: Verdict.SKIP}, "steps": 4}


@pytest.mark.parametrize(
    "meshes",
    [
        [({"shard": True}, 1), ({"pp": 2}, 0)],  # the pipeline's second stage has no gradient that is bad
        pytest.param([({}, 1), ({"tp": 2}, 1), ({"cp": 2}, 1)], marks=pytest.mark.slow),
    ],
    ids=["fsdp, pp", "dp, tp, cp"],
)
def test_a_gradient_that_is_no_number_on_one_rank_is_skipped_by_all(
    meshes: list[tuple[dict[str, Any], int]], tmp_path: Path
) -> None:
    _check(tmp_path, {f"split {i}": _nan(mesh, on) for i, (mesh, on) in enumerate(meshes)})


def test_a_loss_that_is_no_number_on_one_tensor_rank_is_skipped_by_all(tmp_path: Path) -> None:
    """Tensor ranks compute the same loss each; they do not add theirs up."""
    _check(tmp_path, {"loss": _nan({"tp": 2}, 1, of="loss")})


@pytest.mark.slow
@pytest.mark.parametrize("mesh, on", [({"shard": True}, 1), ({"pp": 2}, 0), ({"tp": 2}, 1)], ids=["fsdp", "pp", "tp"])
def test_spikes_on_one_rank_are_skipped_and_send_all_back(mesh: dict[str, Any], on: int, tmp_path: Path) -> None:
    alone, row = WINDOW + 6, WINDOW + 12  # a single one, and so many in a row that the run goes back
    bad = dict.fromkeys([alone, row, row + 1, row + 2], 1e6)
    wanted = {**dict.fromkeys([alone, row, row + 1], Verdict.SKIP), row + 2: Verdict.ROLL_BACK}
    fault = {"parallel": mesh, "on": on, "of": "gradient", "bad": bad, "wanted": wanted, "steps": WINDOW + 16}
    _check(tmp_path, {"spikes": fault})
    # The third spike of the row took the run back to the newest checkpoint, and on behind the data of all three.
    newest = row // 10 * 10
    assert torch.load(tmp_path / "spikes-fault/end-0.pt")["cursor"] == WINDOW + 16 + row + 3 - newest
