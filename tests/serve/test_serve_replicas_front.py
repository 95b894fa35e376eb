"""The process in front of replicas that do as a test says, and what `--replicas` cannot be had with."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from herd.errors import MissingDependency, ResourceError, UsageError
from herd.serve import Keys, ServeConfig
from herd.serve.app import ROUTES
from herd.serve.keys import StoredKey
from herd.serve.replicas import Cluster, Front, check_replicas
from herd.serve.replicas import replica as replica_module
from herd.serve.replicas.replica import Forwarded, News, Part, Replica, State
from herd.serve.security import Gate

CHAT = "/v1/chat/completions"
KEY = "key-of-alice"
SAID = {"messages": [{"role": "user", "content": "Who are you?"}]}
HEADERS = [(b"content-type", b"application/json")]


class Scripted:
    """A replica, and Ray Serve's handle to it: `script` says what becomes of a request and of its call."""

    def __init__(self, script: Callable[[Scripted, asyncio.Future[None]], Awaitable[None]]) -> None:
        self.got: list[Forwarded] = []
        self.begin = SimpleNamespace(remote=self._begin)
        self.follow = SimpleNamespace(remote=self._follow)
        self._script = script
        self._tasks: list[asyncio.Future[None]] = []
        self._parts: asyncio.Queue[Part | None] = asyncio.Queue()  # None: the process ends
        self._alive = True

    def options(self, *, stream: bool) -> Scripted:
        return self

    def _begin(self, request: Forwarded) -> asyncio.Future[None]:
        self.got.append(request)
        call: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks.append(asyncio.ensure_future(self._script(self, call)))
        return call

    async def _follow(self) -> AsyncGenerator[News, None]:
        if not self._alive:
            await asyncio.Event().wait()  # for a process that never comes
        yield News(State(("tiny",)), ())
        while (part := await self._parts.get()) is not None:
            yield News(State(("tiny",)), (part,))
        raise ProcessLookupError

    def answer(self) -> None:
        """The last request, whole."""
        number = self.got[-1].number
        head = {"type": "http.response.start", "status": 200, "headers": HEADERS}
        body = {"type": "http.response.body", "body": b'{"said":"yes"}', "more_body": False}
        self._parts.put_nowait(Part(number, (head, body), 3))

    def die(self) -> None:
        self._alive = False
        self._parts.put_nowait(None)


async def answers(it: Scripted, call: asyncio.Future[None]) -> None:
    call.set_result(None)
    it.answer()


async def was_dead(it: Scripted, call: asyncio.Future[None]) -> None:
    """Ray Serve keeps the call for the next process."""
    it.die()


async def dies_of_it(it: Scripted, call: asyncio.Future[None]) -> None:
    call.set_result(None)
    await asyncio.sleep(0.01)
    it.die()


async def dies_of_it_at_once(it: Scripted, call: asyncio.Future[None]) -> None:
    """The end is heard of before it is that the call had been accepted."""
    it.die()
    await asyncio.sleep(0.02)
    call.set_exception(ProcessLookupError())


async def ends_with_it(it: Scripted, call: asyncio.Future[None]) -> None:
    """The call fails before the end is heard of."""
    call.set_exception(ProcessLookupError())
    await asyncio.sleep(0.02)
    it.die()


@contextlib.asynccontextmanager
async def fronting(*handles: Scripted, keys: Keys | None = None) -> AsyncIterator[Any]:
    """A client of a front with these replicas, all of which it has heard of."""
    config = ServeConfig()
    front = Front(handles, config)
    transport = httpx.ASGITransport(Gate(front.app, config, keys or Keys([KEY])))
    headers = {"authorization": f"Bearer {KEY}"}
    async with front.app.router.lifespan_context(front.app):
        await asyncio.sleep(0.01)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            yield client


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(10):
            await test()

    asyncio.run(within())


def test_what_had_not_reached_its_replica_is_asked_of_another() -> None:
    async def test() -> None:
        first, second = Scripted(was_dead), Scripted(answers)
        async with fronting(first, second) as client:
            got = await client.post(CHAT, json=SAID)
        assert got.status_code == 200 and got.json() == {"said": "yes"}
        assert len(first.got) == len(second.got) == 1 and first.got[0].body == second.got[0].body

    run(test)


@pytest.mark.parametrize("script", [dies_of_it, dies_of_it_at_once, ends_with_it])
def test_what_its_replica_may_have_died_of_is_not(script: Any) -> None:
    """One request ends one replica at most; the other one lives, and answers the next."""

    async def test() -> None:
        first, second = Scripted(script), Scripted(answers)
        async with fronting(first, second) as client:
            got = await client.post(CHAT, json=SAID)
            assert got.status_code == 503 and got.json()["error"]["code"] == "replica_lost"
            assert got.headers["retry-after"] == "1"
            assert len(first.got) == 1 and not second.got
            assert (await client.post(CHAT, json=SAID)).status_code == 200
        assert len(first.got) == 1 and len(second.got) == 1

    run(test)


def test_no_request_is_tried_for_ever() -> None:
    async def test() -> None:
        handles = [Scripted(was_dead) for _ in range(3)]
        async with fronting(*handles) as client:
            got = await client.post(CHAT, json=SAID)
        assert got.status_code == 503 and got.json()["error"]["code"] == "replica_lost"
        assert sum(len(handle.got) for handle in handles) == 2

    run(test)


@pytest.mark.parametrize(
    ("path", "body", "prompts"),
    [
        (CHAT, {**SAID, "": ["a"] * 5}, 1),
        (CHAT, {**SAID, "prompt": ["a"] * 5}, 1),
        ("/v1/messages", {**SAID, "": ["a"] * 5, "input": ["a"] * 5}, 1),
        ("/v1/completions", {"prompt": ["a"] * 5, "": ["a"] * 9}, 5),
        ("/v1/embeddings", {"input": ["a"] * 5, "prompt": ["a"] * 9}, 5),
    ],
)
def test_what_counts_as_several_requests(path: str, body: dict[str, Any], prompts: int) -> None:
    """A key with just so many in a minute may send it, and then no more."""

    async def test() -> None:
        digest = hashlib.sha256(KEY.encode()).hexdigest()
        keys = Keys([], {"alice": StoredKey(sha256=digest, requests_per_minute=prompts)})
        async with fronting(Scripted(answers), keys=keys) as client:
            got = await client.post(path, json=body)
            assert got.status_code == 200, got.text
            assert (await client.post(CHAT, json=SAID)).status_code == 429

    run(test)


@pytest.mark.parametrize(("method", "path"), [(method, path) for method, path, _ in ROUTES])
def test_every_route_but_health_needs_the_key(method: str, path: str) -> None:
    async def test() -> None:
        handle = Scripted(answers)
        async with fronting(handle) as client:
            path_asked = path.replace("{name:path}", "tiny").replace("{id}", "resp_1")
            json = {} if method == "POST" else None
            for key in ("", "Bearer wrong", f"Bearer {KEY}x"):
                got = await client.request(method, path_asked, json=json, headers={"authorization": key})
                assert got.status_code == (200 if path == "/health" else 401), key
            assert not handle.got
            assert (await client.request(method, path_asked, json=json)).status_code == 200

    run(test)


def test_a_request_cannot_write_lines_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path is decoded when it comes to a replica, line feeds too."""

    async def fails(request: Request) -> Response:
        raise ValueError("a bug")

    def failing(*_: object) -> Starlette:
        return Starlette(routes=[Route("/v1/responses/{id}", fails)])

    monkeypatch.setattr(replica_module, "create_api", failing)
    monkeypatch.setattr(replica_module, "write_log", lambda: None)
    records: list[logging.LogRecord] = []
    monkeypatch.setattr(replica_module.log, "handle", records.append)

    async def test() -> None:
        replica = Replica.__new__(Replica)  # as Ray Serve makes it
        await replica.__init__({"tiny": Path("none")}, ServeConfig(), {}, False)  # type: ignore[misc]
        path = "/v1/responses/x\n12:00:00 INFO all is well"
        await replica.begin(Forwarded(1, "GET", path, b"", b"", (), b"", "alice", "", 1.0))
        news = replica.follow()
        parts: list[Part] = []
        async for each in news:
            parts += each.parts
            if parts and parts[-1].tokens is not None:
                break
        assert parts[0].messages[0]["status"] == 500

    run(test)
    assert len(records) == 1 and "\\n12:00:00" in records[0].getMessage() and "\n" not in records[0].getMessage()
    assert records[0].exc_info is not None


def test_what_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = ServeConfig()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for count, loading, text in ((0, {}, "replicas"), (1025, {}, "1024"), (2, {"cpus": [0]}, "--cpus"),
                                 (2, {"threads": 0}, "--threads")):  # fmt: skip
        with pytest.raises(UsageError, match=text):
            check_replicas(count, config, loading)
    check_replicas(2, ServeConfig(store=tmp_path / "store"), {})
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UsageError, match="RAY_ADDRESS"):
        check_replicas(2, ServeConfig(store=tmp_path / "store"), {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"ray\[serve\]"):
        check_replicas(2, config, {})


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_cluster_where_nobody_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", form.format(bound.getsockname()[1]))
        with pytest.raises(ResourceError, match="RAY_ADDRESS"), Cluster({}, ServeConfig(), {}, 2):
            pass
