"""Everything optional about a run is a callback: logging, checkpoints, averaging, the guard, evaluation.

The loop calls each hook on every callback in order. A callback that remembers something across steps gives it out in
`state()` and takes it back in `load_state()`, so that a resumed run continues as if it had never stopped.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from herd.train.trainer import Trainer, TrainResult


class Verdict(enum.IntEnum):
    """What to do with the gradients of a step; the gravest verdict of all callbacks on all ranks counts."""

    APPLY = 0
    SKIP = 1
    """Leave the weights as they are and go on with the next batch."""
    ROLL_BACK = 2
    """Go back to the newest checkpoint and continue behind the data of this step."""


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step.

    `step` counts finished steps, so the first record has step 1. `loss` is the mean over the `supervised` targets of
    the step, in nats; `grad_norm` is taken before clipping; `seconds` are those of this step alone.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    supervised: float
    seconds: float
    verdict: Verdict = Verdict.APPLY


class Callback:
    """Base class with empty hooks; override what is needed. `name` keys the callback's state in checkpoints. Those that
    are `last` come after all others, the writing of the step's checkpoint included."""

    name = ""
    last = False

    def on_start(self, trainer: Trainer[Any]) -> None:
        """After the state is restored, before the first step."""

    def on_gradients(self, trainer: Trainer[Any], record: StepRecord) -> Verdict:
        """After the backward pass, before the weights change."""
        return Verdict.APPLY

    def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
        """After a step, also a skipped one. `trainer.step` equals `record.step`."""

    def on_finish(self, trainer: Trainer[Any], result: TrainResult) -> None:
        """After the last step, when the final state has been written."""

    def limit(self, step: int) -> int | None:
        """Steps that the run is to have in all, as seen from `step`; None: no opinion."""
        return None

    def seconds_left(self) -> float | None:
        """Time in which the run will have ended; None: no opinion."""
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold: tensors, numbers, strings, and lists and dictionaries of them."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state()` gave."""
