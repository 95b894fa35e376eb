"""A real server on a real socket, with a tiny model, in a thread of the test's process."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("herd._native")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx2")
pytest.importorskip("starlette")

from herd.serve import Keys, Registry, ServeConfig, create_app  # noqa: E402
from herd.serve.server import settings_for  # noqa: E402


@dataclasses.dataclass
class Served:
    """A running server."""

    url: str
    registry: Registry
    app: Any

    def client(self, **more: Any) -> Any:
        return httpx.Client(base_url=self.url, timeout=60, **more)


Serving = Callable[..., contextlib.AbstractContextManager[Served]]


@pytest.fixture(scope="session")
def model_path(make_model: Callable[..., Path]) -> Path:
    return make_model(talkative=True, context_length=512)


@pytest.fixture(scope="session")
def other_path(make_model: Callable[..., Path]) -> Path:
    return make_model(talkative=True, context_length=512, seed=1)


@contextlib.contextmanager
def _serving(
    paths: dict[str, Path], config: ServeConfig | None = None, keys: Keys | None = None, **loading: Any
) -> Iterator[Served]:
    """Serve for the time of a block; the first model is ready."""
    config = config or ServeConfig(port=0)
    registry = Registry(paths, config, {"threads": 1, **loading})
    app = create_app(registry, config, keys or Keys())
    server = uvicorn.Server(settings_for(app))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        served = Served(f"http://127.0.0.1:{port}", registry, app)
        until(lambda: bool(registry.loaded))
        yield served
    finally:
        server.should_exit = True
        thread.join(30)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def serving() -> Serving:
    """Starts a server for the time of a `with` block: paths by name, a ServeConfig, Keys, arguments of LLM."""
    return _serving


@pytest.fixture(scope="session")
def served(serving: Serving, model_path: Path) -> Iterator[Served]:
    """One server for all tests that need nothing special."""
    with serving({"tiny": model_path}) as found:
        yield found
