"""Bits per byte on held-out text, now and then during training; at its end also of each source's part of the text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from herd.corpus import EvaluationWindows
from herd.train.batches import Batch
from herd.train.callbacks import Callback, StepRecord
from herd.train.trainer import Trainer


def score(trainer: Trainer[Any], windows: EvaluationWindows) -> dict[str, float]:
    """Loss in nats per token and bits per byte of all windows under the current weights."""
    nats, weight = trainer.evaluate(Batch.from_arrays(window.batch) for window in windows)
    return {"heldout_loss": nats / weight, "heldout_bits_per_byte": windows.bits_per_byte(nats)}


def score_parts(
    trainer: Trainer[Any], parts: Mapping[str | None, EvaluationWindows]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """What `score` says of all parts together, and for each named part its own with the tokens that were scored.

    The parts share no document, and no document sees another: each token is scored as among all the text.
    """
    nats, bits = {}, {}
    for name, windows in parts.items():
        nats[name] = trainer.evaluate(Batch.from_arrays(window.batch) for window in windows)
        bits[name] = windows.bits_per_byte(nats[name][0])
    total, weight = (sum(values) for values in zip(*nats.values(), strict=True))
    n_bytes = sum(windows.n_bytes for windows in parts.values())
    whole = {"heldout_loss": total / weight, "heldout_bits_per_byte": total / math.log(2) / n_bytes}
    each = {
        name: {
            "heldout_loss": nats[name][0] / nats[name][1],
            "heldout_bits_per_byte": bits[name],
            "heldout_tokens": windows.n_targets,
        }
        for name, windows in parts.items()
        if name is not None
    }
    return whole, each


class HeldOut(Callback):
    """Writes heldout_loss and heldout_bits_per_byte of `windows` into metrics.jsonl, `times` times and at the start.

    The stage scores the end itself, on all held-out text.
    """

    name = "heldout"

    def __init__(self, windows: EvaluationWindows, times: int) -> None:
        self._windows, self._times = windows, times

    def on_start(self, trainer: Trainer[Any]) -> None:
        if self._times and trainer.step == 0:
            self._score(trainer)

    def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
        done, steps = record.step * self._times, trainer.total_steps
        # Once whenever step·times / steps passes a whole number, but not at the very end.
        if done // steps > (done - self._times) // steps and record.step < steps:
            self._score(trainer)

    def _score(self, trainer: Trainer[Any]) -> None:
        trainer.log(score(trainer, self._windows))
