"""Tiny models, and servers that have one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("herd._native")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx2")
pytest.importorskip("starlette")
pytest.register_assert_rewrite("tests.serve.response_checks", "tests.serve.scripted_server")

from herd.serve import Keys, ServeConfig  # noqa: E402
from tests.serve import live_server  # noqa: E402
from tests.serve.live_server import Served  # noqa: E402

Serving = Callable[..., contextlib.AbstractContextManager[Served]]


@pytest.fixture(scope="session")
def model_path(make_model: Callable[..., Path]) -> Path:
    return make_model(talkative=True, context_length=512)


@pytest.fixture(scope="session")
def other_path(make_model: Callable[..., Path]) -> Path:
    return make_model(talkative=True, context_length=512, seed=1)


@pytest.fixture(scope="session")
def serving() -> Serving:
    """Starts a server for the time of a `with` block: paths by name, a ServeConfig, Keys, arguments of LLM."""
    return live_server.serving


@pytest.fixture(scope="session")
def served(serving: Serving, model_path: Path) -> Iterator[Served]:
    """One server for all tests that need nothing special."""
    with serving({"tiny": model_path}) as found:
        yield found


@pytest.fixture(scope="session")
def storing(serving: Serving, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that keeps responses, for two keys."""
    config = ServeConfig(port=0, store=tmp_path_factory.mktemp("store") / "responses.db")
    with serving({"tiny": model_path}, config, Keys(["key-of-alice", "key-of-bob"])) as found:
        yield found


@pytest.fixture
def alice(storing: Served) -> Any:
    """OpenAI's client with the first key of the server that keeps responses."""
    return storing.openai("key-of-alice")


@pytest.fixture
def bob(storing: Served) -> Any:
    """The same with the other key."""
    return storing.openai("key-of-bob")
