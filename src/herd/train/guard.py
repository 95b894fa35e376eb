"""A bad batch must not cost a run: steps that are not finite or spike are skipped, and a row of them rolls back."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import TYPE_CHECKING, Any

from herd.errors import HerdError
from herd.train.announce import announce
from herd.train.callbacks import Callback, StepRecord, Verdict
from herd.train.config import TrainConfig

if TYPE_CHECKING:
    from herd.train.trainer import Trainer

WINDOW = 64
"""Accepted steps whose median gradient norm says what is normal; nothing counts as a spike before it is full."""


class Guard(Callback):
    """Skip a step whose loss or gradient is not finite, or whose gradient norm is more than `spike_factor` medians.

    After `max_skips` skipped steps in a row the weights are suspect as well: the run goes back to its newest
    checkpoint and continues behind the data it stumbled over (as PaLM did, arXiv 2204.02311 §5.1). After
    `max_rollbacks` of those it gives up with a HerdError.
    """

    name = "guard"

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._skips = 0
        self._rollbacks = 0

    def on_gradients(self, trainer: Trainer[Any], record: StepRecord) -> Verdict:
        reason = self._reason(record)
        if reason is None:
            self._norms.append(record.grad_norm)
            self._skips = 0
            return Verdict.APPLY
        self._skips += 1
        announce(f"step {record.step} is skipped: {reason}")
        if self._skips < self._config.max_skips:
            return Verdict.SKIP
        if self._rollbacks >= self._config.max_rollbacks:
            raise HerdError(
                f"training diverged: {self._skips} bad steps in a row, after going back {self._rollbacks} times",
                value=reason,
                fix="lower lr, lengthen warmup, or look at the data of these steps",
            )
        self._rollbacks += 1
        return Verdict.ROLL_BACK

    def _reason(self, record: StepRecord) -> str | None:
        if not math.isfinite(record.loss) or not math.isfinite(record.grad_norm):
            return f"loss {record.loss}, gradient norm {record.grad_norm}"
        factor = self._config.spike_factor
        if factor and len(self._norms) == WINDOW:
            median = statistics.median(self._norms)
            if record.grad_norm > factor * median:
                return f"gradient norm {record.grad_norm:.3g}, the median of the last {WINDOW} is {median:.3g}"
        return None

    def state(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "skips": self._skips, "rollbacks": self._rollbacks}

    def load_state(self, state: dict[str, Any]) -> None:
        self._norms = deque(state["norms"], maxlen=WINDOW)
        self._skips = state["skips"]
        # Going back must not forget that it went back.
        self._rollbacks = max(self._rollbacks, state["rollbacks"])
