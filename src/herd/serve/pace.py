"""How fast a model works off its requests, so that one that would wait too long can be told so at once."""

from __future__ import annotations

import math

_MEMORY = 30.0  # seconds of work after which what was measured counts a third


class Pace:
    """Requests finished over time spent, in the unit that requests are queued by: tokens they may take at most.

    What is measured is what those tokens cost in truth: answers that end early, beginnings that are remembered and
    prompts computed together make it faster than the model computes.
    """

    def __init__(self) -> None:
        self._cost = 0.0
        self._seconds = 0.0

    def worked(self, seconds: float) -> None:
        """Time has been spent, on whatever was running."""
        kept = math.exp(-seconds / _MEMORY)
        self._cost *= kept
        self._seconds = self._seconds * kept + seconds

    def finished(self, cost: float) -> None:
        """A request has ended that was expected to take `cost`."""
        self._cost += cost

    def seconds(self, cost: float) -> float:
        """How long `cost` will take; 0 as long as nothing is known."""
        return cost * self._seconds / self._cost if self._cost else 0.0
