"""Bodies of requests while they are read and parsed, and answers until they are sent: so many bytes of them at a time,
over all requests, and of those a share for each key; and whose turn it is to be parsed."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

from herd.serve.config import ServeConfig
from herd.serve.errors import ApiError

_LARGEST = 16  # bodies of the largest size are there at a time; half of them may be one key's
_ANSWERS = 256 << 20


class Bytes:
    """Those of one application that are there at a time, on one event loop."""

    def __init__(self, what: str, most: int) -> None:
        """`what` they are of; half of the `most` may be one key's."""
        self._what = what
        self._most = most
        self._held: Counter[str] = Counter()  # by key

    @property
    def most_of_one(self) -> int:
        """Of one key."""
        return self._most // 2

    def hold(self, key: str, size: int) -> None:
        """So many bytes more are there. Raises ApiError, and counts nothing, where there is no room for them."""
        if self._held[key] + size > self.most_of_one:
            message = f"too much of this key's {self._what} is on its way at a time"
            raise ApiError(429, message, code="too_many_bytes", retry_after=1)
        if self._held.total() + size > self._most:
            message = f"too much of all {self._what} is on its way"
            raise ApiError(503, message, code="too_many_bytes", retry_after=1)
        self._held[key] += size

    def free(self, key: str, size: int) -> None:
        """So many bytes are gone."""
        self._held[key] -= size


class Answers(Bytes):
    """JSON that is made or waits to be sent."""

    def __init__(self) -> None:
        super().__init__("answers", _ANSWERS)


class Bodies(Bytes):
    """Of requests."""

    def __init__(self, config: ServeConfig) -> None:
        super().__init__("requests", _LARGEST * config.max_body_bytes)
        self._parsing = asyncio.Lock()
        self._lanes: dict[str, asyncio.Lock] = {}  # as many as keys, whose names are known at the start

    @contextlib.asynccontextmanager
    async def turn(self, key: str) -> AsyncIterator[None]:
        """Wait until a large body of this key may be parsed.

        The parser holds Python's lock, in a thread as well as on the event loop. One at a time, with a turn of the loop
        for all others after each, nobody waits for more than one, and a body for no more than one of each other key.
        """
        async with self._lanes.setdefault(key, asyncio.Lock()), self._parsing:
            try:
                yield
            finally:
                await asyncio.sleep(0)
