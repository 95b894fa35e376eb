"""A server that answers as a test says, for `herd bench serve`; and ways to run that against it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from herd.cli import main
from herd.serve.load.generator import LoadConfig, Loaded, run

STREAM = b"HTTP/1.1 200 OK\r\nserver: fake\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"


@dataclass
class Request:
    """What the server got, and a way to answer."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    came: float
    write: Callable[[bytes], Awaitable[None]]
    sent: list[float] = field(default_factory=list)

    async def reply(self, code: int, data: Any, *headers: str) -> None:
        head = "\r\n".join([f"HTTP/1.1 {code} X", "content-type: application/json", *headers, "connection: close"])
        await self.write(f"{head}\r\n\r\n{json.dumps(data)}".encode())

    async def stream(self, *, first: float = 0.0, gap: float = 0.0, tokens: int = 4, usage: bool = True) -> None:
        """A good answer."""
        await self.write(STREAM + b": a comment\n\n" + event({"role": "assistant", "content": ""}))
        await asyncio.sleep(first)
        for i in range(tokens):
            await asyncio.sleep(gap if i else 0.0)
            self.sent.append(time.monotonic())
            await self.write(event({"content": "x"}))
        await self.write(event({}, finish="length"))
        if usage:
            counts = {"prompt_tokens": 9, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 2}}
            await self.write(b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n")
        await self.write(DONE)


def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": finish}]}).encode() + b"\r\n\r\n"


Script = Callable[[Request], Awaitable[None]]


@dataclass
class Server:
    """Answers as `script` says, in a thread of its own; knows all that came and how many were under way at once."""

    script: Script
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    running: int = 0
    most: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            method, path, *headers = (
                (await reader.readuntil(b"\r\n\r\n")).decode().replace(" ", "\r\n", 2).split("\r\n")
            )
            named = dict(line.lower().split(": ", 1) for line in headers[1:] if line)
            body = json.loads(await reader.readexactly(int(named.get("content-length", 0))) or b"{}")
        except asyncio.IncompleteReadError:  # a look whether the server is there
            writer.close()
            return

        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        request = Request(len(self.requests), path, named, body, time.monotonic(), write)
        if method == "GET":
            await request.reply(200, {"data": [{"id": "fake-model"}]})
        else:
            self.requests.append(request)
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                await self.script(request)
            except (ConnectionError, asyncio.CancelledError):
                pass
            finally:
                self.running -= 1
        writer.close()


@contextlib.contextmanager
def serving(script: Script) -> Iterator[Server]:
    server, ready, loop = Server(script), threading.Event(), asyncio.new_event_loop()

    async def listen() -> None:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, backlog=500)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        ready.set()

    def work() -> None:
        loop.create_task(listen())
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def load(server: Server, *, key: str | None = None, **options: Any) -> Loaded:
    defaults: dict[str, Any] = {"rates": (60.0,), "requests": 6, "warmup": 0, "timeout": 20.0, "prompt_tokens": 5}
    if "concurrency" in options:
        del defaults["rates"]
    if "duration" in options:
        del defaults["requests"]
    return run(LoadConfig(url=server.url, **(defaults | options)), key)


def only(loaded: Loaded) -> dict[str, Any]:
    (stage,) = loaded.result["stages"]
    return stage


def bench(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["bench", "serve", *map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code
