"""The weights of a run as arrays for `herd.checkpoint.save`, whole again wherever ranks hold parts of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy.typing as npt

from herd.model import to_array
from herd.train.trainer import Trainer

Arrays = Iterator[tuple[str, npt.NDArray[Any]]]


def export(trainer: Trainer[Any], write: Callable[[Arrays], object]) -> None:
    """Call `write` with (canonical name, array) of every weight, on rank 0. Every rank must call it."""
    weights = trainer.world.whole_weights(trainer.model)
    arrays = ((name.replace("_orig_mod.", ""), to_array(weight)) for name, weight in weights)
    if trainer.world.rank == 0:
        write(arrays)
    deque(arrays, maxlen=0)  # the other ranks take part in gathering them
    trainer.world.barrier()
