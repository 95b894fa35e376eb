"""The phases of a run: where rows or steps change their size, in steps, rows and tokens. Needs no torch.

A phase begins with the first step before which so many tokens have been read. Steps, rows and tokens before a phase
are sums over the phases before it, so what a step has follows from its number.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class LaterPhase(Protocol):
    """Rows of so many tokens, so many of them in a step, from so many tokens on."""

    @property
    def from_tokens(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def batch_size(self) -> int: ...


@dataclass(frozen=True)
class Phase:
    """`first_step`, `first_row` and `first_token` count from 0: so many come before the phase."""

    first_step: int
    first_row: int
    first_token: int
    seq_len: int
    batch_size: int

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, padding included."""
        return self.batch_size * self.seq_len

    def micro_batch(self, tokens: int) -> int:
        """Rows of a forward pass that is to hold so many tokens."""
        return max(1, min(self.batch_size, tokens // self.seq_len))


class Phases(Sequence[Phase]):
    """A run's phases: the first with rows of `seq_len` tokens, `batch_size` a step; then `later` ones, in order.

    A phase that the one before it passes over in a single step never has one of its own, and is left out.
    """

    def __init__(self, seq_len: int, batch_size: int, later: Sequence[LaterPhase] = ()) -> None:
        found = [Phase(0, 0, 0, seq_len, batch_size)]
        for size in later:
            last = found[-1]
            steps = max(0, -(-(size.from_tokens - last.first_token) // last.step_tokens))
            if not steps:
                found.pop()
            found.append(
                Phase(
                    last.first_step + steps,
                    last.first_row + steps * last.batch_size,
                    last.first_token + steps * last.step_tokens,
                    size.seq_len,
                    size.batch_size,
                )
            )
        self._phases = found

    def __len__(self) -> int:
        return len(self._phases)

    def __getitem__(self, index: int) -> Phase:  # type: ignore[override]
        return self._phases[index]

    def number(self, step: int) -> int:
        """Which phase a step is in."""
        return bisect.bisect_right(self._phases, step, key=lambda phase: phase.first_step) - 1

    def rows_before(self, step: int) -> int:
        """Rows of all steps before `step`."""
        phase = self[self.number(step)]
        return phase.first_row + (step - phase.first_step) * phase.batch_size

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before `step`, padding included."""
        phase = self[self.number(step)]
        return phase.first_token + (step - phase.first_step) * phase.step_tokens

    def row_at(self, tokens: int) -> int:
        """The first row that has so many tokens before it."""
        place = bisect.bisect_right(self._phases, tokens, key=lambda phase: phase.first_token) - 1
        phase = self[place]
        row = phase.first_row + -(-(tokens - phase.first_token) // phase.seq_len)
        return row if place + 1 == len(self) else min(row, self[place + 1].first_row)
