"""Work beside the batch that takes long: it is done a piece at a time, between the batch's steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Sequence
from typing import Generic, TypeVar

from herd.engine.backend import CacheFull
from herd.serve.keys import Client

T = TypeVar("T")
Pieces = Generator[None, int, T]
"""Work on a text that has begun: each `send(n)` computes up to n more tokens, and the last one returns the result."""


class Piecework(Generic[T]):
    """A request for work on texts, one after the other. Between two of them it holds nothing, and others may go first.

    Whoever waits for `result`, a list of each text's, does so on the event loop, where this is made; a thread of the
    model does the work.
    """

    def __init__(self, begin: Callable[[list[int]], Pieces[T]], texts: Sequence[list[int]], client: Client) -> None:
        self._begin = begin
        self._texts = texts  # token ids; at least one text
        self._at = 0
        self._end = len(texts)
        self._client = client
        self._pieces: Pieces[T] | None = None
        self._found: list[T] = []
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[list[T]] = self._loop.create_future()
        self.arrived = time.monotonic()
        self.computed = 0
        """Tokens of the text whose turn it is."""
        self.credited = 0.0
        self.tokens = 0
        """Of all texts, those that have been computed; not of a piece that is under way."""

    @property
    def owner(self) -> str:
        return self._client.name

    @property
    def weight(self) -> float:
        return self._client.limits.weight

    @property
    def cost(self) -> int:
        """Tokens of the text whose turn it is."""
        return len(self._texts[self._at])

    @property
    def computable(self) -> int:
        return self.cost

    @property
    def begun(self) -> bool:
        """A text has been done."""
        return self._at > 0

    @property
    def next_is_new(self) -> bool:
        """The next piece is the first one of a text, and somebody waits for it."""
        return self._pieces is None and not self.result.cancelled()

    def advance(self, tokens: int) -> bool:
        """Do a piece of so many tokens; False at the end of the text, also when nobody waits for it any more.

        Raises CacheFull, and is as it was, where there is no room to begin it.
        """
        if self.result.cancelled():
            self._close()
            return False
        try:
            if self._pieces is None:
                self._pieces = self._begin(self._texts[self._at])
            self._pieces.send(tokens)
        except StopIteration as end:
            self._pieces = None
            self._count(self.cost)
            self._found.append(end.value)
            if len(self._found) == self._end:
                self._loop.call_soon_threadsafe(_resolve, self.result, self._found)
        except CacheFull:  # all of a text's room is taken as it begins
            raise
        except BaseException as error:
            self._end = self._at + 1
            self._loop.call_soon_threadsafe(_fail, self.result, error)
        else:
            self._count(min(self.computed + tokens, self.cost))
            return True
        return False

    def _count(self, computed: int) -> None:
        """So many tokens of the text have been computed by now."""
        self.tokens += computed - self.computed
        self.computed = computed

    def next_text(self) -> bool:
        """Go on to the next text; False where there is none, or nobody waits for it."""
        if self._at + 1 == self._end or self.result.cancelled():
            return False
        self._at += 1
        self.computed, self.credited = 0, 0.0
        return True

    def give_up(self, why: BaseException) -> None:
        """End the work where it is; `why` is what waits for its result meets."""
        self._end = self._at + 1
        self._close()
        self._loop.call_soon_threadsafe(_fail, self.result, why)

    def _close(self) -> None:
        if self._pieces is not None:
            self._pieces.close()  # what it holds is free again


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.cancelled():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.cancelled():
        future.set_exception(error)
