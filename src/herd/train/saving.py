"""Checkpoints written beside the training: a step waits for a copy of the state in memory, not for the disk."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from herd.train.state import StateStore


class Saver:
    """Saves to a store: at once, or in a thread of its own from copies of the tensors.

    As a context, it lets no error out while that thread is at work: the process group that the thread exchanges with
    must not be taken away from it.
    """

    def __init__(self, store: StateStore, *, background: bool) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, "herd-checkpoint") if background else None
        self._pending: Future[Path] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
        """Write a checkpoint, after the one before it. Raises what that one raised, if it failed in the background."""
        self.finish()
        if self._thread is None:
            self._store.save(step, tensors, values)
        else:
            copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            self._pending = self._thread.submit(self._store.save, step, copies, values)

    def finish(self) -> None:
        """Wait until everything is written; raise what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            wait([pending])
