"""Long JSON in parts: no part takes long to write, so whoever else asks does not wait for Python's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

SLICE = 1024
"""Items of a list in one part: with twenty members each, they take a few milliseconds."""
_TOGETHER = 1 << 18  # bytes that are as good as one part


def lists_in_parts(slices: Iterable[Mapping[str, Sequence[Any]]]) -> Iterator[bytes]:
    """JSON of an object of lists, of which one slice after the other is given, at least one."""
    parts: dict[str, list[bytes]] = {}
    for each in slices:
        for name, values in each.items():
            parts.setdefault(name, []).append(orjson.dumps(values)[1:-1])
    for i, (name, of_list) in enumerate(parts.items()):
        yield (b"," if i else b"{") + orjson.dumps(name) + b":["
        for j, part in enumerate(of_list):
            yield (b"," if j else b"") + part
        yield b"]"
    yield b"}"


class PartsResponse(Response):
    """A response whose JSON is sent part by part, as the client takes it.

    `on_close` is called when it has taken all of them, as far as this process can see, or has gone.
    """

    media_type = "application/json"

    def __init__(self, parts: Iterable[bytes], on_close: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._parts = deque(_grouped(parts))
        self._on_close = on_close
        self.headers["content-length"] = str(sum(map(len, self._parts)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while self._parts:
                await send({"type": "http.response.body", "body": self._parts.popleft(), "more_body": True})
            # Each waits until what was sent before it has been taken.
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._on_close()


def _grouped(parts: Iterable[bytes]) -> list[bytes]:
    """The same bytes in parts that are worth sending."""
    groups: list[list[bytes]] = [[]]
    size = 0
    for part in parts:
        if size > _TOGETHER:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += len(part)
    return [b"".join(group) for group in groups]
