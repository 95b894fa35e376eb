"""One line of the log for each request: who asked for what, and how that ended. Nothing of what was said is in it."""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("herd.serve")

_PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Asked for every few seconds by machines: they are told of where they fail."""
_PATH_LENGTH = 200  # bytes


class RequestLog:
    """A layer around everything else, so that what is refused is told as well.

    `POST /v1/chat/completions 200 3.21s 1840B key=ann 10.0.0.7`; status 499 where a client went before it had an
    answer, `cut` behind the bytes where a stream did not come to its end. A query is left out, as it may hold a key.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, size, whole = time.perf_counter(), 499, 0, False

        async def counting(message: Message) -> None:
            nonlocal status, size, whole
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
                whole = not message.get("more_body", False)

        try:
            await self._app(scope, receive, counting)
        finally:
            if status >= 400 or scope["path"] not in _PROBES:
                cut = "" if whole or status == 499 else " cut"
                seconds = time.perf_counter() - start
                log.info(
                    "%s %s %d %.2fs %dB%s%s %s",
                    scope["method"], _path(scope), status, seconds, size, cut, _key(scope), _address(scope),
                )  # fmt: skip


def _path(scope: Scope) -> str:
    """As the client wrote it, on one line whatever it is."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw[:_PATH_LENGTH].decode("ascii", "backslashreplace").encode("unicode_escape").decode()


def _key(scope: Scope) -> str:
    """The name of the key, as --api-keys has it; nothing for who needs none or has none."""
    client = scope.get("state", {}).get("client")
    return f" key={client.name}" if client is not None and client.owner else ""


def _address(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else "-"
