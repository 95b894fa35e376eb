"""Server-sent events, and noticing that whoever asked has gone.

A stream begins with its first event: what fails before that is an ordinary response with its status. Between events a
comment says that the server lives. A client that does not read what it is sent has its connection cut by the server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Literal, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from herd.serve.config import ServeConfig
from herd.serve.errors import ApiError, as_api_error, error_body, error_response

T = TypeVar("T")
log = logging.getLogger("herd.serve")

DONE = b"data: [DONE]\n\n"
UNREAD = "unread"
"""In a request's state, once the connection was cut as the client had read nothing for too long."""
_PING = b": ping\n\n"

End = Literal["done", "error", "deadline", "stopped", "disconnected", "unread"]
"""How a stream ended: whole; with an error event, for want of time or as the model stopped, or for another reason; the
client had gone, or did not read what it was sent."""


def event(data: Any, name: str | None = None) -> bytes:
    """One event. JSON has no line breaks of its own, so it is one line."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + orjson.dumps(data) + b"\n\n"


def end_with(error: ApiError) -> End:
    """How a stream ended of which this error was the last event."""
    ends: dict[str | None, End] = {
        "deadline_exceeded": "deadline",
        "timeout_exceeded": "deadline",
        "stopped": "stopped",
    }
    return ends.get(error.code, "error")


class ClientGone(Exception):
    """Whoever asked does not listen any more."""


async def gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes. Raises ClientGone then."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, leaving):
            each.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


class EventStream(Response):
    """A response whose events come from a generator.

    `on_close` is called at the end, whatever happens, with the status, and how the stream ended if one began.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], config: ServeConfig, on_close: Callable[[int, End | None], None]
    ) -> None:
        super().__init__()
        self._events = events
        self._config = config
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.ensure_future(gone(receive))
        following = asyncio.ensure_future(anext(self._events))
        started, status = False, 499
        end: End = "disconnected"
        try:
            while True:
                await asyncio.wait(
                    {following, leaving}, timeout=self._config.ping_seconds, return_when=asyncio.FIRST_COMPLETED
                )
                if leaving.done():
                    return
                part, last = _PING, False
                if following.done():
                    try:
                        part = following.result()
                        following = asyncio.ensure_future(anext(self._events))
                    except StopAsyncIteration:
                        part, last, end = b"", True, "done"
                    except Exception as error:
                        told = as_api_error(error)
                        if told.code == "internal_error":
                            log.error("a stream failed", exc_info=error)
                        if not started:
                            status = told.status
                            await error_response(told, scope["path"])(scope, receive, send)
                            return
                        part, last, end = event(error_body(told, scope["path"])), True, end_with(told)
                if not started:
                    started, status = True, 200
                    await send(_START)
                await send({"type": "http.response.body", "body": part, "more_body": not last})
                if last:
                    return
        except OSError:
            end = "disconnected"
        finally:
            for task in (following, leaving):
                task.cancel()
            await asyncio.gather(following, leaving, return_exceptions=True)
            await self._events.aclose()
            if scope.get("state", {}).get(UNREAD):
                end = "unread"
            self._on_close(status, end if started else None)


_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),  # proxies must not hold events back
    ],
}
