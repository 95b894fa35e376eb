"""Averaged weights against the same averages made by hand from every step's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from herd.train import Callback, StepRecord, TrainConfig, Trainer


class _Source:
    def batch(self, step: int) -> list[Any]:
        return [_Number(step)]

    def fingerprint(self) -> str:
        return "numbers"


class _Number:
    n_tokens = 1

    def __init__(self, step: int) -> None:
        self.step = step

    def to(self, device: torch.device) -> _Number:
        return self


class _Path(Callback):
    """Copies of the weights after each step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
        self.weights.append(trainer.model.weight.detach().clone())


def _fit(out: Path, callbacks: Sequence[Callback] = (), **fields: Any) -> tuple[nn.Module, list[Tensor]]:
    model = nn.Linear(3, 2, bias=False)
    nn.init.ones_(model.weight)

    def loss(model: Any, batch: _Number) -> tuple[Tensor, Tensor]:
        return (model.weight * (batch.step % 3 - 1)).sum() + model.weight.square().sum(), torch.ones(())

    path = _Path()
    config = TrainConfig(steps=20, lr=0.05, precision="fp32", checkpoint_seconds=0, **fields)
    Trainer(model, loss, _Source(), config, out, [path, *callbacks]).fit()
    return model, path.weights


def test_tail_is_the_mean_of_the_last_steps(tmp_path: Path) -> None:
    model, path = _fit(tmp_path, average="tail", tail=0.25)
    torch.testing.assert_close(model.weight.detach(), torch.stack(path[-5:]).mean(0))


def test_ema_is_the_recurrence(tmp_path: Path) -> None:
    model, path = _fit(tmp_path, average="ema", ema_decay=0.8)
    average = path[0]
    for count, weights in enumerate(path[1:], 2):
        share = max(0.2, 1 / count)
        average = (1 - share) * average + share * weights
    torch.testing.assert_close(model.weight.detach(), average)


@pytest.mark.parametrize("average", ["ema", "tail"])
def test_training_itself_is_not_changed(tmp_path: Path, average: str) -> None:
    _, plain = _fit(tmp_path / "a")
    _, averaged = _fit(tmp_path / "b", average=average)
    assert all(torch.equal(a, b) for a, b in zip(plain, averaged, strict=True))


def test_a_tail_that_moves_away_starts_anew(tmp_path: Path) -> None:
    """The end of a run may move while it runs: then only the last share of the real run counts."""

    class Longer(Callback):
        def limit(self, step: int) -> int:
            return 10 if step < 10 else 20

    class Early(Callback):
        def limit(self, step: int) -> int:
            return 10

    for callbacks, last in (([Longer()], 20), ([Early()], 10)):
        model, weights = _fit(tmp_path / str(last), callbacks, average="tail", tail=0.4)
        assert len(weights) == last
        torch.testing.assert_close(model.weight.detach(), torch.stack(weights[-round(0.4 * last) :]).mean(0))
