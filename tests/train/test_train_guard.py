"""Bad steps: skipped, rolled back, and in the end an error; with real gradients that are spoilt on purpose."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from herd.errors import HerdError
from herd.train import Batch, TrainConfig, Trainer, Verdict
from herd.train.callbacks import StepRecord
from herd.train.guard import WINDOW, Guard


class _Source:
    """Batch `step` says its own number, so that a loss can tell which data it sees."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def batch(self, step: int) -> list[Batch]:
        self.asked.append(step)
        tokens = torch.full((1, 4), step)
        return [Batch(tokens, tokens, torch.zeros(1, 4, dtype=torch.int32), torch.ones(1, 4))]

    def fingerprint(self) -> str:
        return "its own number"


class _Quadratic(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3, 3), 2.0))


def _run(out: Path, bad: dict[int, float], **fields: Any) -> tuple[Trainer[Any], _Source]:
    """Minimise |w|²; the loss of data step s is multiplied by bad[s]."""

    def loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        step = int(batch.tokens_BS[0, 0])
        return model.weight.square().sum() * bad.get(step, 1.0), torch.ones(())

    settings: dict[str, Any] = {"steps": 100, "batch_size": 1, "seq_len": 4, "lr": 1e-3, "precision": "fp32"}
    settings |= {"checkpoint_seconds": 0, "checkpoint_every": 10, "log_every": 1, "weight_decay": 0.0}
    source = _Source()
    config = TrainConfig.model_validate(settings | fields)
    return Trainer(_Quadratic(), loss, source, config, out), source


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_the_weights_alone(
    tmp_path: Path, value: float, capfd: pytest.CaptureFixture[str]
) -> None:
    clean, _ = _run(tmp_path / "a", {}, steps=9, schedule="constant", warmup=0)
    clean.fit()
    spoilt, source = _run(tmp_path / "b", {4: value}, steps=10, schedule="constant", warmup=0)
    spoilt.fit()
    assert torch.equal(clean.model.weight, spoilt.model.weight)
    assert source.asked == list(range(10))
    assert "step 5 is skipped" in capfd.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped") for line in lines] == [None] * 4 + [1] + [None] * 5
    assert lines[4]["loss"] is None


def test_a_spike_is_skipped_once_the_usual_is_known(tmp_path: Path) -> None:
    early, _ = _run(tmp_path / "a", {5: 1000.0}, steps=8)
    early.fit()
    assert early.recent[5][0] > 100 * early.recent[4][0]  # applied: nothing was usual yet
    late, _ = _run(tmp_path / "b", {WINDOW + 5: 1000.0, WINDOW + 9: 5.0}, steps=WINDOW + 15)
    late.fit()
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == [WINDOW + 6]


def test_many_bad_steps_roll_back_and_leave_their_data_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = {step: math.nan for step in (23, 24, 25)}
    trainer, source = _run(tmp_path, bad, steps=40, max_skips=3)
    trainer.fit()
    # Steps 24 to 26 use data 23 to 25; the third of them goes back to the checkpoint of step 20, then data 26 follows.
    assert source.asked == [*range(26), *range(26, 46)]
    assert "went back from step 26 to 20" in capfd.readouterr().err
    assert trainer.cursor == 46 and trainer.step == 40
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    events = [line for line in lines if "event" in line]
    assert events == [{"step": 20, "event": "rollback", "from_step": 26}]
    assert [line["step"] for line in lines if "event" not in line] == list(range(1, 41))


def test_nothing_is_saved_while_steps_are_skipped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer, _ = _run(tmp_path, {step: math.nan for step in (23, 24, 25)}, steps=40, max_skips=3, checkpoint_every=1)
    trainer.fit()
    assert "went back from step 26 to 23" in capfd.readouterr().err


def test_it_gives_up_in_the_end(tmp_path: Path) -> None:
    trainer, _ = _run(tmp_path, {step: math.nan for step in range(5, 1000)}, max_skips=2, max_rollbacks=2)
    with pytest.raises(HerdError, match=r"diverged: 2 bad steps in a row, after going back 2 times.*lower lr"):
        trainer.fit()


def test_zero_means_never_for_spikes() -> None:
    guard = Guard(TrainConfig(spike_factor=0))
    usual = StepRecord(1, 1.0, 1.0, 1e-3, 1, 1.0, 0.1)
    trainer: Any = None
    for _ in range(WINDOW):
        assert guard.on_gradients(trainer, usual) is Verdict.APPLY
    assert guard.on_gradients(trainer, StepRecord(2, 1.0, 1e9, 1e-3, 1, 1.0, 0.1)) is Verdict.APPLY
    assert guard.on_gradients(trainer, StepRecord(3, 1.0, math.nan, 1e-3, 1, 1.0, 0.1)) is Verdict.SKIP


def test_bad_steps_with_good_ones_between_do_not_roll_back(tmp_path: Path) -> None:
    trainer, source = _run(tmp_path, {step: math.nan for step in (12, 14, 16, 18, 20, 22)}, steps=30, max_skips=2)
    trainer.fit()
    assert source.asked == list(range(30))


def test_an_infinite_loss_counts_even_with_a_finite_gradient() -> None:
    trainer: Any = None
    record = StepRecord(1, math.inf, 1.0, 1e-3, 1, 1.0, 0.1)
    assert Guard(TrainConfig()).on_gradients(trainer, record) is Verdict.SKIP


def test_a_step_without_supervised_tokens_is_skipped(tmp_path: Path) -> None:
    trainer, _ = _run(tmp_path, {}, steps=2)
    trainer.loss_fn = lambda model, batch: (model.weight.sum() * 0, torch.zeros(()))
    before = trainer.model.weight.clone()
    trainer.fit()
    assert torch.equal(trainer.model.weight, before)
