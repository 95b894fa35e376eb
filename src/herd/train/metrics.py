"""What a run says about itself: metrics.jsonl for machines, one live line for people.

metrics.jsonl holds one JSON object a line, each with the `step` it belongs to. A resumed run drops the lines behind
the step it continues from, so that the file always tells one story.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.files import atomic_write
from herd.progress import interactive, status
from herd.train.announce import announce
from herd.train.callbacks import Callback, StepRecord, Verdict
from herd.train.memory import memory_bytes

if TYPE_CHECKING:
    from herd.train.trainer import Trainer, TrainResult


_LIVE_SECONDS, _LINE_SECONDS = 0.5, 60.0
"""Between changes of the live line, and between lines where nobody watches a terminal: a log says that it goes on."""


class MetricsFile:
    """Append-only JSON Lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps, and a last line that a kill cut short."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) != len(lines) or (lines and not self.path.read_bytes().endswith(b"\n")):
            with atomic_write(self.path, "w") as file:
                file.writelines(line + "\n" for line in kept)

    def has(self, step: int, name: str) -> bool:
        """Whether a line of this step has the value `name`."""
        if not self.path.exists():
            return False
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        return any(name in json.loads(line) for line in lines if _step_of(line) == step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; numbers that JSON cannot hold (NaN, infinity) become null."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")


def _step_of(line: str) -> float:
    """The step of a line, or infinity for one that is not whole."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Metrics(Callback):
    """A line in metrics.jsonl every `log_every` steps and at the end, and the live status line; without a terminal, its
    text once a minute.

    loss: mean per supervised token since the last line · tokens: seen so far, padding included · tokens_per_second:
    of training steps since the last line · mfu: FLOPs of the model / FLOPs that the measured matmul peak allows ·
    grad_norm: before clipping, of this step · skipped: steps since the last line that the guard refused.
    """

    name = "metrics"

    def __init__(self, every: int) -> None:
        self._every = every
        self._loss = self._weight = self._seconds = 0.0
        self._tokens = self._skipped = 0
        self._shown = time.monotonic()
        self._pace: float | None = None

    def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
        self._seconds += record.seconds
        self._tokens += record.tokens
        if record.verdict is Verdict.APPLY:
            self._loss += record.loss * record.supervised
            self._weight += record.supervised
        else:
            self._skipped += 1
        self._pace = record.seconds if self._pace is None else 0.9 * self._pace + 0.1 * record.seconds
        if trainer.world.rank != 0:
            return
        if time.monotonic() - self._shown > (_LIVE_SECONDS if interactive() else _LINE_SECONDS):
            self._shown = time.monotonic()
            say = status if interactive() else announce
            say(self._live(trainer, record))
        if record.step % self._every == 0 or record.step == trainer.total_steps:
            self._write(trainer, record)

    def _write(self, trainer: Trainer[Any], record: StepRecord) -> None:
        speed = self._tokens / self._seconds
        values: dict[str, Any] = {
            "loss": self._loss / self._weight if self._weight else None,
            "lr": record.lr,
            "grad_norm": record.grad_norm,
            "tokens": trainer.tokens,
            "supervised_tokens": trainer.supervised,
            "tokens_per_second": round(speed, 1),
            "mfu": trainer.mfu(speed),
            "memory_bytes": memory_bytes(trainer.device),
            "seconds": round(trainer.seconds, 3),
        }
        if self._skipped:
            values["skipped"] = self._skipped
        trainer.log(values)
        self._loss = self._weight = self._seconds = 0.0
        self._tokens = self._skipped = 0

    def _live(self, trainer: Trainer[Any], record: StepRecord) -> str:
        speed = record.tokens / record.seconds
        mfu = trainer.mfu(speed)
        parts = [
            f"step {record.step:,}/{trainer.total_steps:,}",
            f"loss {record.loss:.3f}",
            f"lr {record.lr:.1e}",
            f"norm {record.grad_norm:.2f}",
            f"{speed:,.0f} tok/s",
            *([f"{mfu:.0%} MFU"] if mfu else []),
            f"{memory_bytes(trainer.device) / 1e9:.1f} GB",
            f"{_clock(self._left(trainer, record.step))} left",
        ]
        return " · ".join(parts)

    def _left(self, trainer: Trainer[Any], step: int) -> float:
        """Seconds at the pace of late, or those that the run has at most."""
        limits = [callback.seconds_left() for callback in trainer.callbacks]
        return min([(trainer.total_steps - step) * (self._pace or 0), *(each for each in limits if each is not None)])

    def on_finish(self, trainer: Trainer[Any], result: TrainResult) -> None:
        status("")

    def state(self) -> dict[str, Any]:
        return {
            "sums": [self._loss, self._weight, self._seconds],
            "counts": [self._tokens, self._skipped],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._loss, self._weight, self._seconds = state["sums"]
        self._tokens, self._skipped = state["counts"]


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{whole % 60:02d}"
