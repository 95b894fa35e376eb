"""As many steps as fit into a time, on whatever machine this is, with a learning rate that ends where it should.

A schedule must know its length, so a first plan is made from a few trial steps that leave no trace. Machines change
their speed, so the plan is revised whenever a third of what remained is done: the last revisions are small, the end is
on time. Every decision is written to plan.json before it counts: a resumed run that comes by the same step takes the
same decision, and ends in the same bits.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.errors import FileFormatError, ResourceError, UsageError
from herd.files import read_json, write_json
from herd.train.callbacks import Callback, StepRecord
from herd.train.config import TrainConfig

if TYPE_CHECKING:
    from herd.train.trainer import Trainer

TRIALS = 5
SCORING = 0.5
"""Time to score a held-out token / time to train on one: a third by arithmetic, 0.3 to 0.45 measured."""
MARGIN = 0.95
"""Share of the remaining time that is planned for; what is left over goes into the next revision."""
FEWEST_STEPS = 10


SHORT = 180.0
"""Seconds of a stage in which compiling, 10 to 60 of them, would not pay."""


def within(seconds: float, config: TrainConfig) -> TrainConfig:
    """The configuration for a stage of so many seconds: "auto" does not compile in a short one."""
    short = config.compile == "auto" and seconds < SHORT
    return config.model_copy(update={"compile": "off"}) if short else config


@dataclass(frozen=True)
class Revision:
    """From `step` on the run has `total` steps: decided at `step_seconds` a step with `seconds_left`."""

    step: int
    total: int
    step_seconds: float
    seconds_left: float

    @property
    def next(self) -> int:
        """The step after which the plan is looked at again: a third of the way to the end."""
        return self.step + math.ceil((self.total - self.step) / 3)


class TimeLimit(Callback):
    """Limits the steps of a run, at most to the configuration's, so that a stage ends within `seconds`.

    `started`: when the stage began (monotonic seconds); of a run that was interrupted, the time up to its last
    checkpoint counts too.
    `scored_along`, `scored_at_end`: held-out tokens that go through the model during training and after it.
    Raises ResourceError when the time is too short for any training, FileFormatError for a damaged plan, UsageError
    for a run that was begun without a limit.
    """

    name = "time_limit"

    def __init__(
        self, seconds: float, plan_file: Path, *, started: float, scored_along: int = 0, scored_at_end: int = 0
    ) -> None:
        self._seconds, self._file, self._started = seconds, plan_file, started
        self._along, self._at_end = scored_along, scored_at_end
        self._before = 0.0
        self._running = False
        self._plan: list[Revision] = []
        self._mark: tuple[int, float] | None = None

    def on_start(self, trainer: Trainer[Any]) -> None:
        self._running = True
        resumed = trainer.resumed_from is not None  # else a plan in the directory is that of another run
        plan = read_plan(self._file, trainer.config.steps) if resumed and trainer.world.rank == 0 else []
        flat = trainer.world.from_first([float(number) for one in plan for number in astuple(one)])
        self._plan = [Revision(int(a), int(b), c, d) for a, b, c, d in zip(*[iter(flat)] * 4, strict=True)]
        if not self._plan:
            if trainer.step:
                directory = self._file.parent
                raise UsageError("this run has no plan to continue by", fix=f"remove {directory} and start again")
            per_step = step_seconds(trainer)
            self._revise(trainer, per_step, self._left(trainer, per_step, self._along + self._at_end), FEWEST_STEPS)

    def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
        revision = self._in_force(record.step)
        if record.step == revision.next and record.step < revision.total:
            per_step = self._pace(record.step) or revision.step_seconds
            self._revise(trainer, per_step, self._left(trainer, per_step, self._at_end), 0)
            revision = self._plan[-1]
        if self._mark is None or record.step == revision.step:  # the first step after a start compiles
            self._mark = record.step, time.monotonic()

    def limit(self, step: int) -> int | None:
        return self._in_force(step).total if self._plan else None

    def seconds_left(self) -> float | None:
        return max(0.0, self._seconds - self._elapsed())

    def state(self) -> dict[str, Any]:
        return {"elapsed": self._elapsed()}

    def load_state(self, state: dict[str, Any]) -> None:
        if not self._running:  # when a run goes back, time goes on
            self._before = state["elapsed"]

    def _elapsed(self) -> float:
        return self._before + time.monotonic() - self._started

    def _left(self, trainer: Trainer[Any], per_step: float, scored: int) -> float:
        return self._seconds - self._elapsed() - SCORING * per_step / trainer.config.batch_tokens * scored

    def _pace(self, step: int) -> float | None:
        """Seconds a step since the last revision, with evaluations and checkpoints; None: too few steps to tell."""
        if self._mark is None or step - self._mark[0] < TRIALS:
            return None
        return (time.monotonic() - self._mark[1]) / (step - self._mark[0])

    def _in_force(self, step: int) -> Revision:
        return next(revision for revision in reversed(self._plan) if revision.step <= step)

    def _revise(self, trainer: Trainer[Any], per_step: float, left: float, fewest: int) -> None:
        """Rank 0's clock decides for all."""
        per_step, left = trainer.world.from_first([per_step, left])
        fitting = fitting_steps(left, per_step, trainer.config.steps - trainer.step, fewest)
        revision = Revision(trainer.step, trainer.step + fitting, per_step, left)
        self._plan = [old for old in self._plan if old.step < revision.step] + [revision]
        if trainer.world.rank == 0:
            write_json(self._file, {"revisions": [asdict(one) for one in self._plan]})


def step_seconds(trainer: Trainer[Any], trials: int = TRIALS) -> float:
    """Median seconds of a training step, compiling left out. Weights, optimiser and cursor are as before.

    The steps are real ones at learning rate 0, on the first data of the run.
    """
    trainer.optimizer.set_lr(0.0)
    seconds = []
    for trial in range(trials + 1):
        start = time.perf_counter()
        norm = trainer.gradients(trial)[1]
        if math.isfinite(norm):  # a bad batch must not reach the weights: 0 times infinity is not 0
            trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    trainer.optimizer.reset()
    return statistics.median(seconds[1:])


def fitting_steps(seconds_left: float, per_step: float, most: int, fewest: int = FEWEST_STEPS) -> int:
    """Steps that fit, from 0 to `most`. Raises ResourceError when not even `fewest` do."""
    steps = max(0, int(MARGIN * seconds_left / per_step))
    if steps < min(fewest, most):
        raise ResourceError(
            f"only {steps} training steps of {per_step:.1f} s fit into the time",
            value=f"{max(seconds_left, 0):.0f} s left",
            fix="raise max_minutes, or lower what comes before training (sft.exercises) or what a step costs",
        )
    return min(steps, most)


def read_plan(path: Path, most: int) -> list[Revision]:
    """The decisions of earlier calls in the same directory. Raises FileFormatError for a plan that is none."""
    if not path.exists():
        return []
    try:
        plan = [Revision(**entry) for entry in read_json(path)["revisions"]]
        ordered = all(old.step < new.step for old, new in itertools.pairwise(plan))
        if plan[0].step != 0 or not ordered or not all(one.step <= one.total <= most for one in plan):
            raise ValueError
    except (KeyError, IndexError, TypeError, ValueError):
        raise FileFormatError(
            "is not a plan for this configuration", file=path, field="revisions", fix=f"remove {path.parent}"
        ) from None
    return plan
