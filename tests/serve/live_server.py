"""A real server on a real socket, with a tiny model, in a thread of the test's process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn

from herd import LLM
from herd.errors import OutOfMemory
from herd.serve import Keys, Registry, ServeConfig, create_app
from herd.serve.server import settings_for


def memory_for(path: Path) -> int:
    """Bytes that a model takes at least."""
    with pytest.raises(OutOfMemory) as refused:
        LLM(path, memory=0)
    return refused.value.needed


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


@dataclasses.dataclass
class Served:
    """A running server."""

    url: str
    registry: Registry
    app: Any
    server: uvicorn.Server

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    @property
    def driver(self) -> Any:
        """What drives the first model in memory."""
        return self.registry.loaded[0].driver

    @property
    def llm(self) -> Any:
        """The first model in memory."""
        return self.registry.loaded[0].llm

    def is_free(self) -> bool:
        """No request is left anywhere, and every page of the cache can be given out again."""
        backend = self.llm.backend
        return self.driver.idle and not backend._sequences and backend._pages.available == backend._pages.n_pages

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The model takes no step for the time of the block."""
        backend, go = self.llm.backend, threading.Event()
        step = backend.step

        def wait(spans: Any) -> Any:
            go.wait(60)
            return step(spans)

        backend.step = wait
        try:
            yield
        finally:
            del backend.step
            go.set()

    def client(self, **more: Any) -> Any:
        """A client of HTTP; `more` is its own options."""
        return httpx.Client(base_url=self.url, timeout=60, **more)

    def openai(self, key: str = "none") -> Any:
        """OpenAI's official client."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def post(self, path: str, body: dict[str, Any], key: str = "none") -> socket.socket:
        """Send a request and leave the answer unread."""
        data = json.dumps(body).encode()
        raw = socket.create_connection(self.address, timeout=60)
        raw.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {key}\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        return raw


@contextlib.contextmanager
def serving(
    paths: dict[str, Path], config: ServeConfig | None = None, keys: Keys | None = None, **loading: Any
) -> Iterator[Served]:
    """Serve for the time of a block; the first model is ready. `loading` is LLM's options."""
    config = config or ServeConfig(port=0)
    registry = Registry(paths, config, {"threads": 1, **loading})
    app = create_app(registry, config, keys or Keys())
    server = uvicorn.Server(settings_for(app, config))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        served = Served(f"http://127.0.0.1:{port}", registry, app, server)
        until(lambda: bool(registry.loaded))
        yield served
    finally:
        server.should_exit = True
        thread.join(5)
