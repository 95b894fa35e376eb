"""Bodies of requests while they are read and parsed: so many bytes of them at a time, over all requests, and of those a
share for each key; and whose turn it is to be parsed."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

from herd.serve.config import ServeConfig
from herd.serve.errors import ApiError

_LARGEST = 16  # bodies of the largest size are there at a time; half of them may be one key's


class Bodies:
    """Those of one application, on one event loop."""

    def __init__(self, config: ServeConfig) -> None:
        self._most = _LARGEST * config.max_body_bytes
        self._held: Counter[str] = Counter()  # bytes by key
        self._parsing = asyncio.Lock()
        self._lanes: dict[str, asyncio.Lock] = {}  # as many as keys, whose names are known at the start

    def hold(self, key: str, size: int) -> None:
        """So many bytes more are there. Raises ApiError, and counts nothing, where there is no room for them."""
        if self._held[key] + size > self._most // 2:
            message = "too much of this key's requests is on its way at a time"
            raise ApiError(429, message, code="too_many_bytes", retry_after=1)
        if self._held.total() + size > self._most:
            raise ApiError(503, "too much of all requests is on its way", code="too_many_bytes", retry_after=1)
        self._held[key] += size

    def free(self, key: str, size: int) -> None:
        """So many bytes are gone."""
        self._held[key] -= size

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
