"""When to write the state: every so many steps, or every so many seconds, whichever comes first."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from herd.train.callbacks import Callback, StepRecord, Verdict
from herd.train.config import TrainConfig

if TYPE_CHECKING:
    from herd.train.trainer import Trainer


class Checkpoints(Callback):
    """Calls `trainer.save()`. The clock may decide when: a run computes the same whenever it is saved, unless the guard
    sends it back to its newest checkpoint. Nothing is saved while steps are skipped: going back is to lead behind the
    trouble."""

    def __init__(self, config: TrainConfig) -> None:
        self._steps, self._seconds = config.checkpoint_every, config.checkpoint_seconds
        self._last = time.monotonic()

    def on_start(self, trainer: Trainer[Any]) -> None:
        self._last = time.monotonic()

    def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
        if record.verdict is not Verdict.APPLY:
            return
        by_steps = self._steps > 0 and record.step % self._steps == 0
        by_time = self._seconds > 0 and time.monotonic() - self._last >= self._seconds
        if trainer.world.any(by_steps or by_time):
            trainer.save()
            self._last = time.monotonic()
