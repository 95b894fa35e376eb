"""A response that comes from a replica, on its way to the client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from herd.serve.errors import error_body
from herd.serve.replicas.link import Exchange, ReplicaLost, replica_lost
from herd.serve.replicas.replica import Part
from herd.serve.sse import event, gone


class Relay(Response):
    """`first` has the status; `on_close` is called when nothing more is to be sent, before the last of it is."""

    def __init__(self, exchange: Exchange, first: Part, on_close: Callable[[], None]) -> None:
        head = first.messages[0]
        super().__init__(status_code=head["status"])
        self._exchange = exchange
        self._part = first
        self._on_close: Callable[[], None] | None = on_close
        self._events = dict(head["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.ensure_future(gone(receive))
        try:
            try:
                await self._relay(send, leaving)
            except ReplicaLost:
                if self._events:
                    last = {"type": "http.response.body", "body": _lost(scope["path"]), "more_body": False}
                    await send(last)
                # Else the connection is cut: half an answer must not look like a whole one.
        except OSError:
            return  # the client has gone, or its connection was cut because it does not read
        finally:
            leaving.cancel()
            self._close()

    async def _relay(self, send: Send, leaving: asyncio.Task[None]) -> None:
        """All parts, until the last one or until the client leaves. Raises ReplicaLost."""
        while True:
            if self._part.tokens is not None:  # whoever has all of it may ask for more at once
                self._close()
            for message in self._part.messages:
                await send(message)
            if self._part.tokens is not None:
                return
            following = asyncio.ensure_future(self._exchange.next())
            await asyncio.wait({following, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                following.cancel()
                return
            self._part = following.result()

    def _close(self) -> None:
        if self._on_close is not None:
            self._on_close()
            self._on_close = None


def _lost(path: str) -> bytes:
    """The last event of a stream whose replica is gone."""
    data = error_body(replica_lost(), path)
    return event(data, "error") if path.startswith("/v1/messages") else event(data)
