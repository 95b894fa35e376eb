"""Whose turn the cache is, where answers and a text to embed do not both fit: each has it for as long as the other.

A text needs room for all of it at once, which answers give it by going back to the queue with all their tokens. The
time for which they, or others, waited for that room is owed to them: until they have gone on for as long, no further
text begins.
"""

from __future__ import annotations

from collections.abc import Iterable

from herd.engine.live_sequence import LiveSequence


class Turns:
    """Used by the thread of a model alone."""

    def __init__(self) -> None:
        self._owed = 0.0  # seconds
        self._behind: set[LiveSequence] = set()  # to whom

    @property
    def of_texts(self) -> bool:
        """A text may begin, and make answers give way."""
        self._forget()
        return not self._behind

    def worked(self, seconds: float, short_of_room: Iterable[LiveSequence]) -> None:
        """A piece of a text has been computed, while these answers waited for room."""
        self._forget()
        self._behind.update(short_of_room)
        if self._behind:
            self._owed += seconds

    def stepped(self, seconds: float) -> None:
        """The batch has taken a step. It counts when all who had to wait go on, and have again what they had."""
        if all(s.handle is not None and len(s.tokens) - s.n_computed <= 1 for s in self._behind):
            self._owed -= seconds
        self._forget()

    def _forget(self) -> None:
        """Who has ended is owed nothing, and nobody is once all of it has been given back."""
        self._behind = {s for s in self._behind if s.completion is None and s.error is None}
        if self._owed <= 0 or not self._behind:
            self._owed = 0.0
            self._behind.clear()
