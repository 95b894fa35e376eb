"""Batches of a run whose rows and steps change their size: the source of each phase after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from herd.corpus import RowSource
from herd.pretrain.phases import Phases
from herd.train.batches import Batch, PackedSource
from herd.train.callbacks import Callback, StepRecord
from herd.train.trainer import Trainer
from herd.train.world import World


class PhasedSource:
    """The steps of the phases. `rows` are each phase's, `micro_batch` the rows of a forward pass in the first one: the
    others' hold as many tokens. `begun_from`: what else the run is known by, as the weights it begins with.

    Raises UsageError where the ranks cannot share a phase's rows evenly.
    """

    def __init__(
        self,
        phases: Phases,
        rows: Sequence[RowSource],
        micro_batch: int,
        world: World | None = None,
        begun_from: str = "",
    ) -> None:
        self._phases, self._begun_from = phases, begun_from
        tokens = micro_batch * phases[0].seq_len
        self._parts = [
            PackedSource(part, phase.micro_batch(tokens), world) for part, phase in zip(rows, phases, strict=True)
        ]

    def batch(self, step: int) -> list[Batch]:
        """The micro-batches of one optimiser step, for this rank."""
        number = self._phases.number(step)
        return self._parts[number].batch(step - self._phases[number].first_step)

    def fingerprint(self) -> str:
        parts = [part.fingerprint() for part in self._parts]
        return hashlib.sha256(repr((parts, self._begun_from)).encode()).hexdigest()


class RowLength(Callback):
    """Tells the loop how long the rows of a step are, for its FLOPs."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases

    def on_start(self, trainer: Trainer[Any]) -> None:
        self._tell(trainer, trainer.cursor)

    def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
        self._tell(trainer, trainer.cursor - 1)

    def _tell(self, trainer: Trainer[Any], step: int) -> None:
        trainer.row_tokens = self._phases[self._phases.number(step)].seq_len
