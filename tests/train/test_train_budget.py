"""How many steps fit into a time: the arithmetic, and that measuring leaves the run as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from herd import model as models  # noqa: E402
from herd.architecture import LlamaConfig  # noqa: E402
from herd.errors import ResourceError, UsageError  # noqa: E402
from herd.files import read_json, write_json  # noqa: E402
from herd.train import Batch, Callback, StepRecord, TrainConfig, Trainer, lr_factor, next_token_loss  # noqa: E402
from herd.train.budget import Revision, TimeLimit, fitting_steps, read_plan, step_seconds, within  # noqa: E402
from herd.train.world import OneRank  # noqa: E402

SHAPE = LlamaConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64, vocab_size=64)


class Random:
    def batch(self, step: int) -> list[Batch]:
        tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(step))
        return [Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(4, 16, dtype=torch.int32), torch.ones(4, 16))]

    def fingerprint(self) -> str:
        return "random"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_measuring_leaves_no_trace(optimizer: str, tmp_path: Path) -> None:
    llama = models.Llama(SHAPE)
    llama.init_weights(0)
    before = {key: value.clone() for key, value in llama.state_dict().items()}
    config = TrainConfig.model_validate({"optimizer": optimizer, "seq_len": 16, "batch_size": 4, "compile": "off"})
    trainer: Trainer[Batch] = Trainer(llama, next_token_loss, Random(), config, tmp_path)
    assert 0 < step_seconds(trainer, 2) < 10
    assert all(torch.equal(before[key], value) for key, value in llama.state_dict().items())
    assert trainer.step == trainer.cursor == 0
    assert not trainer.optimizer.state(llama) and all(p.grad is None for p in llama.parameters())


class Clock(Callback):
    """Time that passes with the steps alone: so many seconds each, by the share of 100 seconds that is gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speed: dict[float, float], stop_at: int | None = None) -> None:
        self.now, self._speed, self._stop_at = 1000.0, speed, stop_at
        monkeypatch.setattr("herd.train.budget.time.monotonic", lambda: self.now)
        monkeypatch.setattr("herd.train.budget.step_seconds", lambda _: 1.0)

    def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
        gone = (self.now - 1000) / 100
        self.now += next(step for until, step in self._speed.items() if gone < until)
        if record.step == self._stop_at:
            raise KeyboardInterrupt


SETTINGS = {"seq_len": 16, "batch_size": 4, "compile": "off", "schedule": "linear", "final_lr_ratio": 0.0}


class Loop:
    """Only what a time limit sees of a trainer."""

    world, device, resumed_from = OneRank(), torch.device("cpu"), None
    total_steps = property(lambda self: min(self.config.steps, self.limit.limit(self.step)))

    def __init__(self, most: int) -> None:
        self.config = TrainConfig.model_validate(SETTINGS | {"steps": most})
        self.step = 0

    def fit(self, clock: Clock, plan: Path) -> list[float]:
        """Learning rates of all steps of a run of 100 seconds by this clock."""
        self.limit, rates = TimeLimit(100.0, plan, started=clock.now), []
        self.limit.on_start(self)  # type: ignore[arg-type]
        while self.step < self.total_steps:
            rates.append(lr_factor(self.step, self.total_steps, self.config))
            self.step += 1
            record = StepRecord(self.step, 1.0, 1.0, rates[-1], 64, 64.0, 1.0)
            clock.on_step(self, record)  # type: ignore[arg-type]
            self.limit.on_step(self, record)  # type: ignore[arg-type]
        return rates


@pytest.mark.parametrize(
    ("speed", "steps"),
    [({9: 1.0}, 98), ({9: 0.1}, 990), ({9: 2.0}, 48), ({0.3: 1.0, 9: 0.5}, 165), ({0.5: 0.5, 9: 1.5}, 130)],
)
def test_a_run_ends_on_time_whatever_the_speed_does(
    speed: dict[float, float], steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, speed)
    rates = Loop(10**6).fit(clock, tmp_path / "plan.json")
    assert 93 <= clock.now - 1000 <= 103 and len(rates) == pytest.approx(steps, rel=0.1)
    assert rates[-1] == 0 and max(rates) == 1, "the schedule ends with the last step"


def test_the_configuration_is_the_most_and_the_time_may_be_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(Loop(20).fit(Clock(monkeypatch, {9: 0.01}), tmp_path / "few.json")) == 20
    late = Clock(monkeypatch, {0.05: 1.0, 9e9: 1000.0})
    assert len(Loop(10**6).fit(late, tmp_path / "late.json")) < 40, "the next look after the time is up ends the run"


def trained(directory: Path, clock: Clock) -> Trainer[Batch]:
    """A real run of 100 seconds by this clock."""
    llama = models.Llama(SHAPE)
    llama.init_weights(0)
    config = TrainConfig.model_validate(SETTINGS | {"steps": 1000, "lr": 1e-2, "checkpoint_every": 10})
    limit = TimeLimit(100.0, directory / "plan.json", started=clock.now)
    return Trainer(llama, next_token_loss, Random(), config, directory, [clock, limit])


@pytest.mark.slow
def test_a_resumed_run_decides_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = {0.3: 1.0, 9: 0.5}
    whole = trained(tmp_path / "whole", Clock(monkeypatch, speed))
    whole.fit()
    decided = read_plan(tmp_path / "whole" / "plan.json", 1000)
    directory = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        trained(directory, Clock(monkeypatch, speed, stop_at=47)).fit()
    begun = read_plan(directory / "plan.json", 1000)
    assert 1 < len(begun) < len(decided) and begun == decided[: len(begun)]
    # Decisions that were taken stay taken, whatever the time says now; here all of them.
    write_json(directory / "plan.json", read_json(tmp_path / "whole" / "plan.json"))
    again = trained(directory, Clock(monkeypatch, {9e9: 70.0}))
    assert again.fit().resumed_from == 40 and again.total_steps == whole.total_steps
    for name, weights in whole.model.state_dict().items():
        assert torch.equal(weights, again.model.state_dict()[name])


def test_the_plan_of_a_run_whose_state_is_gone_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path, Clock(monkeypatch, {9: 0.5})).fit()
    shutil.rmtree(tmp_path / "state")
    clock = Clock(monkeypatch, {9: 2.0})
    assert trained(tmp_path, clock).fit().steps < 60 and clock.now < 1105


def test_a_few_slow_steps_after_a_start_do_not_make_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, Clock(monkeypatch, {9: 1.0}, stop_at=31)).fit()
    [first] = read_plan(tmp_path / "plan.json", 1000)
    assert first.next == 32
    clock = Clock(monkeypatch, {0.2: 9.0, 9: 1.0})  # resumed at 30; the first steps seem to take nine seconds
    trained(tmp_path, clock).fit()
    assert read_plan(tmp_path / "plan.json", 1000)[1].total > 60


def test_going_back_follows_the_plan_of_that_step(tmp_path: Path) -> None:
    limit = TimeLimit(100.0, tmp_path / "plan.json", started=0.0)
    assert limit.limit(5) is None, "no plan yet, no limit"
    limit._plan = [Revision(0, 95, 1.0, 100.0), Revision(32, 191, 0.4, 68.0)]
    assert [limit.limit(step) for step in (0, 28, 31, 32, 100)] == [95, 95, 95, 191, 191]


def test_a_limit_cannot_be_taken_away_from_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path, Clock(monkeypatch, {9: 4.0}))
    run.fit()
    with pytest.raises(UsageError, match="was trained with time_limit"):
        Trainer(run.model, next_token_loss, Random(), run.config, tmp_path).fit()


def test_a_run_without_a_plan_cannot_be_limited_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, Clock(monkeypatch, {9: 5.0}, stop_at=12)).fit()
    (tmp_path / "plan.json").unlink()
    with pytest.raises(UsageError, match="no plan"):
        trained(tmp_path, Clock(monkeypatch, {9: 5.0})).fit()


def test_short_stages_are_not_compiled_unless_asked_for() -> None:
    config = TrainConfig()
    assert within(20.0, config).compile == "off" and within(200.0, config) == config
    asked = config.model_copy(update={"compile": "on"})
    assert within(20.0, asked) == asked


def test_steps_that_fit() -> None:
    assert fitting_steps(100.0, 0.5, 10**6) == 190
    assert fitting_steps(100.0, 0.5, 50) == 50
    with pytest.raises(ResourceError, match=r"only 4 training steps of 20.0 s fit.*max_minutes"):
        fitting_steps(100.0, 20.0, 10**6)
    with pytest.raises(ResourceError, match="only 0 training steps"):
        fitting_steps(-5.0, 1.0, 100)
