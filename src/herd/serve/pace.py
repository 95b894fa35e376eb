"""How fast a model works off its requests, so that one that would wait too long can be told so at once."""

from __future__ import annotations

import math
from typing import Protocol

_MEMORY = 30.0  # seconds of work after which what was measured counts a third
_ENDS = 32  # finished requests after which what was learned of their ends counts a third


class Progress(Protocol):
    """A request that is worked on. Tokens are counted without those that were remembered of its beginning."""

    credited: float
    """The share of its cost that has been counted as done."""

    @property
    def cost(self) -> int: ...

    @property
    def computed(self) -> int:
        """Tokens so far."""

    @property
    def computable(self) -> int:
        """Tokens at most."""


class Pace:
    """Work done over time spent, in the unit that requests are queued by: tokens they may take at most.

    What is measured is what those tokens cost in truth: answers that end early, beginnings that are remembered and
    prompts computed together make it faster than the model computes. A request's cost counts as done bit by bit, as it
    goes on towards the length that requests have had of late, so that long answers say as they run how long they take.
    """

    def __init__(self) -> None:
        self._cost = 0.0
        self._seconds = 0.0
        self._computed = 0.0  # of finished requests
        self._computable = 0.0

    def worked(self, seconds: float) -> None:
        """Time has been spent, on whatever was running."""
        kept = math.exp(-seconds / _MEMORY)
        self._cost *= kept
        self._seconds = self._seconds * kept + seconds

    def went_on(self, request: Progress) -> None:
        """A request runs that may have more tokens now. One that is cancelled has cost what it was credited for."""
        likely = self._computed / self._computable if self._computable else 1.0
        self._credit(request, request.computed / max(1.0, likely * request.computable))

    def finished(self, request: Progress) -> None:
        """A request has come to its own end, however early that was: all that it was expected to take is done."""
        kept = math.exp(-1 / _ENDS)
        self._computed = self._computed * kept + request.computed
        self._computable = self._computable * kept + request.computable
        self._credit(request, 1.0)

    def _credit(self, request: Progress, share: float) -> None:
        share = min(1.0, max(request.credited, share))  # who gave its place away begins again, and is paid once
        self._cost += request.cost * (share - request.credited)
        request.credited = share

    def seconds(self, cost: float) -> float:
        """How long `cost` will take; 0 as long as nothing is known."""
        return cost * self._seconds / self._cost if self._cost else 0.0
