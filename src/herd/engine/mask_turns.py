"""Whose masks are computed in a step of the batch: all of them take a bounded part of it, however many answers ask.

Masks are computed by the thread that runs the batch, so everybody waits for each of them. A step has a few milliseconds
for them; what one mask takes beyond that, the steps after it do not have. Cheap ones come first, and the longer an
answer has sat out, the sooner it is its turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from herd.engine.constraint import Constraint, GrammarFailed

STEP_S = 0.02
"""Processor time for masks in a step that others wait for: 64 answers take 6 ms usually, 30 ms seldom."""


class MaskTurns:
    """Those of one batch."""

    def __init__(self) -> None:
        self._left = STEP_S

    def begin(self, *, alone: bool) -> None:
        """A step begins. `alone`: there is nothing else to do in it, so that nobody waits."""
        self._left = STEP_S if alone else min(STEP_S, self._left + STEP_S)

    def late(self, asking: Sequence[Constraint]) -> list[Constraint]:
        """Have masks computed while there is time; of those who ask, the ones that sit out this step.

        What goes wrong with a mask shows when it is asked for.
        """
        late = []
        self._left -= sum(constraint.take_unpaid() for constraint in asking)  # of tokens that were chosen
        for constraint in sorted(asking, key=lambda c: c.mask_s / (1 + c.sat_out)):
            if constraint.ready:
                continue
            if self._left <= 0:
                constraint.sat_out += 1
                late.append(constraint)
                continue
            with contextlib.suppress(GrammarFailed):
                constraint.allowed()
            constraint.sat_out = 0
            self._left -= constraint.take_unpaid()
        return late
