"""Requests that wait for a place: a bounded queue that is fair between keys.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996): a job of a key begins, in virtual time, when the key's job
before it ends, or now; jobs leave in the order of their beginnings. So a key that sends a thousand jobs delays another
key's first one by no more than what is being served, and keys that all have work share the model by their weights.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Job(Protocol):
    """What waits: whose it is, and what it will cost, in tokens."""

    @property
    def owner(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def cost(self) -> int: ...

    @property
    def arrived(self) -> float:
        """When, by any clock."""


J = TypeVar("J", bound=Job)


class FairQueue(Generic[J]):
    """Not thread-safe."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, J]] = []
        self._end_of: dict[str, float] = {}  # by owner, when its last job ends
        self._gone: set[int] = set()
        self._number = itertools.count()
        self._number_of: dict[int, int] = {}  # by the identity of a job
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._number_of)

    def put(self, job: J) -> None:
        start = max(self._now, self._end_of.get(job.owner, 0.0))
        self._end_of[job.owner] = start + job.cost / job.weight
        number = next(self._number)
        self._number_of[id(job)] = number
        heapq.heappush(self._heap, (start, number, job))

    def pop(
        self, may_go: Callable[[J], bool] = lambda job: True, fits: Callable[[J], bool] = lambda job: True
    ) -> J | None:
        """The job whose turn it is, of those that may go: others keep their turn. None when there is none, or when it
        does not fit yet: then nobody goes past it, as it might wait for ever.
        """
        kept: list[tuple[float, int, J]] = []
        found: J | None = None
        while self._heap and found is None:
            start, number, job = heapq.heappop(self._heap)
            if number in self._gone:
                self._gone.remove(number)
            elif not may_go(job):
                kept.append((start, number, job))
            elif not fits(job):
                kept.append((start, number, job))
                break
            else:
                found = job
                self._now = max(self._now, start)  # it began before, if it was kept
                del self._number_of[id(job)]
        for entry in kept:
            heapq.heappush(self._heap, entry)
        if found is not None and not self._number_of:  # nobody waits: what was is forgotten
            self._end_of.clear()
            self._now = 0.0
        return found

    def remove(self, job: J) -> bool:
        """Take out a job that waits; False when it does not."""
        number = self._number_of.pop(id(job), None)
        if number is None:
            return False
        self._gone.add(number)
        self._end_of[job.owner] -= job.cost / job.weight  # those behind it stay where they are, further ones do not
        if len(self._gone) > len(self._number_of) + 64:  # whoever comes and goes leaves nothing behind
            self._heap = [entry for entry in self._heap if entry[1] not in self._gone]
            heapq.heapify(self._heap)
            self._gone.clear()
        return True

    def last_of_the_longest(self, than: str) -> J | None:
        """The newest job of the owner with the most that wait, if that is another one than `than`, who has fewer."""
        waiting: dict[str, list[tuple[float, int, J]]] = {}
        for _, number, job in self._heap:
            if number not in self._gone:
                waiting.setdefault(job.owner, []).append((job.arrived, number, job))
        longest = max(waiting, key=lambda owner: len(waiting[owner]), default=than)
        if longest == than or len(waiting[longest]) <= len(waiting.get(than, ())) + 1:
            return None
        return max(waiting[longest], key=lambda entry: entry[:2])[2]  # who waits again has not come again

    def ahead_of(self, owner: str) -> int:
        """Cost of the jobs that would leave before a new one of this owner."""
        start = max(self._now, self._end_of.get(owner, 0.0))
        return sum(job.cost for begin, number, job in self._heap if begin <= start and number not in self._gone)

    def jobs(self) -> list[J]:
        """All that wait, in no order."""
        return [job for _, number, job in self._heap if number not in self._gone]
