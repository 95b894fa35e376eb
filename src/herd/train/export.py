"""The weights of a run as arrays for `herd.checkpoint.save`, whole again wherever ranks hold parts of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy.typing as npt

from herd.model import to_array
from herd.train.callbacks import Callback, StepRecord
from herd.train.trainer import Trainer

Arrays = Iterator[tuple[str, npt.NDArray[Any]]]


def export(trainer: Trainer[Any], write: Callable[[Arrays], object]) -> None:
    """Call `write` with (canonical name, array) of every weight, on rank 0. Every rank must call it."""
    weights = trainer.world.whole_weights(trainer.model)
    arrays = ((name.replace("_orig_mod.", ""), to_array(weight)) for name, weight in weights)
    if trainer.world.rank:
        deque(arrays, maxlen=0)  # the other ranks take part in gathering them
    trainer.world.first(lambda: write(arrays))


class Exports(Callback):
    """Exports the weights after every so many steps; `write(step, weights)` is called on rank 0."""

    def __init__(self, every: int, write: Callable[[int, Arrays], object]) -> None:
        self._every, self._write = every, write

    def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
        if record.step % self._every == 0:
            export(trainer, lambda weights: self._write(record.step, weights))
