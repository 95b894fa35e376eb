"""A replica as the front sees it: what it says of itself, what it has to do, and the requests that are on their way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from herd.serve.errors import ApiError
from herd.serve.replicas.replica import Forwarded, News, Part, State

log = logging.getLogger("herd.serve")
_SILENCE = 30.0  # seconds without a sign of life after which nothing more is sent to a replica
_AGAIN = 0.2  # seconds until it is asked for one again
_DOUBT = 0.1  # seconds in which it is heard of all calls to a lost replica that it had taken them
_LAST_WORDS = 5.0  # seconds in which a replica says what a request took that nobody waits for


class ReplicaLost(Exception):
    """The replica has gone, and with it what it was doing."""


def replica_lost() -> ApiError:
    """What a client is told then."""
    return ApiError(503, "the process that answered has ended", code="replica_lost", retry_after=1)


class Link:
    """One replica. `handle` is Ray Serve's; `on_loss` is called when its process has ended, or says nothing."""

    def __init__(self, number: int, handle: Any, on_loss: Callable[[int], None]) -> None:
        self.number = number
        self.state: State | None = None
        """What it said last; None while it cannot be reached."""
        self.was_ready = False
        self._handle = handle
        self._streams = handle.options(stream=True)
        self._on_loss = on_loss
        self._exchanges: dict[int, Exchange] = {}  # by the numbers of their requests

    @property
    def load(self) -> int:
        """Requests that are on their way."""
        return len(self._exchanges)

    @property
    def ready(self) -> bool:
        return self.state is not None and self.state.ready

    def send(self, request: Forwarded) -> Exchange:
        """Begin a request; who does so must finish it."""
        exchange = self._exchanges[request.number] = Exchange(self, request)
        return exchange

    def begin(self, request: Forwarded) -> Any:
        """Ray's promise that the replica has got a request."""
        return self._handle.begin.remote(request)

    def remove(self, number: int) -> None:
        """A request is over."""
        self._exchanges.pop(number, None)

    async def call(self, method: str, *arguments: object) -> Any:
        """The result of another method of the replica's. Raises ReplicaLost, whatever the reason."""
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except Exception as error:
            raise ReplicaLost from error

    async def follow(self) -> None:
        """Hear what the replica says of itself and of all requests, over all its lives."""
        while True:
            news = self._streams.follow.remote()
            try:
                while True:
                    # Ray Serve holds a call back until there is a process for it, which may take its time.
                    async with asyncio.timeout(None if self.state is None else _SILENCE):
                        self._hear(await anext(news))
            except Exception as error:
                self._lose(error)
            finally:
                _cancel(news)
            await asyncio.sleep(_AGAIN)

    def _hear(self, news: News) -> None:
        if news.state.ready and not self.ready:
            log.info("replica %d is ready", self.number)
        self.state = news.state
        self.was_ready |= news.state.ready
        for part in news.parts:
            exchange = self._exchanges.get(part.number)
            if exchange is not None:  # else it was given up
                exchange.put(part)

    def _lose(self, error: Exception) -> None:
        if self.state is not None:
            log.warning("replica %d is lost (%s); %d requests", self.number, type(error).__name__, self.load)
        self.state = None
        self._on_loss(self.number)
        for exchange in self._exchanges.values():
            exchange.put(None)


def _cancel(response: Any) -> None:
    """Ray does not do what a call asked for any more, if it still can."""
    with contextlib.suppress(Exception):  # such as that there was no process to do it
        response.cancel()


class Exchange:
    """One request on its way: the parts of the response come from `next`, and `finish` must be called in the end."""

    def __init__(self, link: Link, request: Forwarded) -> None:
        self.tokens = 0
        """What it took, once it is whole."""
        self.whole = False
        """All has come."""
        self._link = link
        self._number = request.number
        self._parts: asyncio.Queue[Part | None] = asyncio.Queue()  # None: nothing more will come
        self._lost = False
        self._begun = link.begin(request)
        self._beginning = asyncio.create_task(self._begin())

    async def next(self) -> Part:
        """What has come since. Raises ReplicaLost."""
        part = await self._parts.get()
        if part is None:
            self._lost = True
            raise ReplicaLost
        if part.tokens is not None:
            self.tokens, self.whole = part.tokens, True
        return part

    def put(self, part: Part | None) -> None:
        """What has come; None when the replica is lost."""
        self._parts.put_nowait(part)

    async def taken(self) -> bool:
        """Once the replica is lost: whether it had taken the request, so that this may be what it died of.

        Ray Serve keeps a call for the next process where the old one had not accepted it: such a `begin` stays open.
        One that was accepted has returned, or fails. Only a request that ends its process before that has said that it
        accepts the call, which takes it less than a millisecond, cannot be told from one that never came there.
        """
        await asyncio.wait({self._beginning}, timeout=_DOUBT)
        return self._beginning.done()

    async def finish(self) -> None:
        """Give it up, unless it is whole; returns when the replica has done so, and said what it took."""
        try:
            if not self.whole and not self._lost:
                async with asyncio.timeout(_LAST_WORDS):
                    await self._link.call("leave", self._number)
                    while not self.whole:
                        await self.next()
        except (TimeoutError, ReplicaLost):
            pass
        finally:
            self.forget()

    def forget(self) -> None:
        """It does not count for its replica's load any more, and does not begin there if it has not yet."""
        self._link.remove(self._number)
        if not self._beginning.done():
            self._beginning.cancel()
            _cancel(self._begun)

    async def _begin(self) -> None:
        try:
            await self._begun
        except Exception as error:
            log.debug("request %d did not reach its replica", self._number, exc_info=error)
            self.put(None)
