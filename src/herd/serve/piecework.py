"""Work beside the batch that takes long: it is done a piece at a time, between the batch's steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")
Pieces = Generator[None, int, T]
"""Work that has begun: each `send(n)` computes up to n more tokens, and the last one returns the result."""


class Piecework(Generic[T]):
    """Work for whoever waits for `result` on the event loop, where this is made; a thread of the model does it."""

    def __init__(self, begin: Callable[[], Pieces[T]]) -> None:
        self._begin = begin
        self._pieces: Pieces[T] | None = None
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[T] = self._loop.create_future()

    def advance(self, tokens: int) -> bool:
        """Do a piece of so many tokens; False at the end of the work, also when nobody waits for it any more."""
        if self.result.cancelled():
            self._close()
            return False
        try:
            if self._pieces is None:
                self._pieces = self._begin()
            self._pieces.send(tokens)
        except StopIteration as end:
            self._loop.call_soon_threadsafe(_resolve, self.result, end.value)
        except BaseException as error:
            self._loop.call_soon_threadsafe(_fail, self.result, error)
        else:
            return True
        return False

    def give_up(self, why: BaseException) -> None:
        """End the work where it is; `why` is what waits for its result meets."""
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
