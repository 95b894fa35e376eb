"""Streams are counted by how they ended, and a response by the status that was really sent."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest

from herd.serve import ServeConfig
from herd.serve.errors import ApiError
from herd.serve.sse import EventStream

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    MESSAGES: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400},
    RESPONSES: {"input": "hi"},
    "/v1/completions": {"prompt": "hi"},
}


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def counts(served: Any, name: str, label: str) -> dict[tuple[str, str], float]:
    """A counter's values by path and another label, of paths for text."""
    with served.client() as client:
        page = client.get("/metrics").text
    values = {}
    for labels, value in re.findall(rf"^{name}_total{{(.*)}} (\S+)$", page, re.MULTILINE):
        found = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        values[found["path"], found[label]] = float(value)
    return {key: value for key, value in values.items() if key[0] in BODIES}


def slowed(served: Any, seconds: float) -> None:
    """Each step of the model takes a while."""
    backend = served.registry.loaded[0].llm.backend
    step = backend.step

    def slowly(spans: Any) -> Any:
        time.sleep(seconds)
        return step(spans)

    backend.step = slowly


def sent(served: Any, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which a request has been sent."""
    host, port = served.url.removeprefix("http://").split(":")
    raw = socket.create_connection((host, int(port)), timeout=60)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    raw.sendall(head.encode() + b"\r\n\r\n" + data)
    return raw


def no_room(*arguments: Any, **options: Any) -> Any:
    raise ApiError(503, "no room")


@pytest.mark.parametrize("path", BODIES)
def test_how_a_stream_ends(serving: Any, model_path: Path, path: str) -> None:
    """Whole; given up after it began; left by the client; ended with the model; and refused before it began."""
    body = {**BODIES[path], "stream": True}
    tokens = "max_output_tokens" if path == RESPONSES else "max_tokens"
    expected: dict[tuple[str, str], float] = {}

    def ended(how: str) -> None:
        expected[path, how] = 1.0
        until(lambda: counts(served, "herd_streams", "end") == expected)

    with serving({"tiny": model_path}, ServeConfig(port=0, deadline=1.0)) as served, served.client() as client:
        assert client.post(path, json={**body, tokens: 3}).status_code == 200
        ended("done")
        assert client.post(path, json={**BODIES[path], tokens: 3}).status_code == 200  # no stream
        slowed(served, 0.02)
        answer = client.post(path, json={**body, tokens: 400, "temperature": 0})
        assert answer.status_code == 200 and "too long" in answer.text
        ended("deadline")
        with sent(served, path, {**body, tokens: 400, "temperature": 0}) as raw:
            raw.recv(1000)
        ended("disconnected")
        llm = served.registry.loaded[0].llm
        begin, llm.begin = llm.begin, no_room
        assert client.post(path, json={**body, tokens: 400}).status_code == 503  # before the first token
        llm.begin = begin
        with sent(served, path, {**body, tokens: 400, "temperature": 0}) as raw:
            raw.recv(1000)
            served.registry.loaded[0].driver.stop(ApiError(503, "the server stops", code="stopped"))
            ended("stopped")
        assert counts(served, "herd_responses", "status") == {(path, "200"): 5.0, (path, "503"): 1.0}


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_that_fails(serving: Any, model_path: Path, path: str) -> None:
    """After its first token, for a reason that is the server's own."""
    tokens = "max_output_tokens" if path == RESPONSES else "max_tokens"
    with serving({"tiny": model_path}) as served, served.client() as client:
        scheduler = served.registry.loaded[0].llm.scheduler
        advance, steps = scheduler._advance, []

        def fail_late() -> None:
            steps.append(1)
            if len(steps) > 3:
                raise RuntimeError("broken")
            advance()

        scheduler._advance = fail_late
        answer = client.post(path, json={**BODIES[path], tokens: 50, "stream": True, "temperature": 0})
        assert answer.status_code == 200 and "broken" not in answer.text
        until(lambda: counts(served, "herd_streams", "end") == {(path, "error"): 1.0})


async def _endless() -> AsyncGenerator[bytes, None]:
    while True:
        yield b"data: x\n\n"


def test_a_connection_that_breaks_while_it_is_written_to() -> None:
    """Its client has gone. (That one which does not read is cut: test_serve_unread.py.)"""
    told: list[tuple[int, str | None]] = []
    stream = EventStream(_endless(), ServeConfig(), lambda status, end: told.append((status, end)))

    async def receive() -> dict[str, str]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            raise OSError("reset")

    asyncio.run(stream({"type": "http", "path": "/v1/x"}, receive, send))  # type: ignore[arg-type]
    assert told == [(200, "disconnected")]


def test_a_client_that_leaves_before_the_first_event() -> None:
    told: list[tuple[int, str | None]] = []

    async def never() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(60)
        yield b""

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        raise AssertionError("nobody reads it")

    stream = EventStream(never(), ServeConfig(), lambda status, end: told.append((status, end)))
    asyncio.run(stream({"type": "http", "path": "/v1/x"}, receive, send))  # type: ignore[arg-type]
    assert told == [(499, None)]
