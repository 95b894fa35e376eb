"""One replica: the models and the whole API without its gate, in a process of its own that Ray Serve keeps alive.

The front has asked who somebody is and how much they may; a request arrives here as `Forwarded`, goes through the same
ASGI application as in a server of one process, and what that application sends goes back as it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.types import Message

from herd.serve.app import create_api, models_ready
from herd.serve.config import ServeConfig
from herd.serve.errors import ApiError
from herd.serve.keys import Client, KeyLimits
from herd.serve.log import write_log
from herd.serve.registry import Registry

log = logging.getLogger("herd.serve")
_BEAT = 1.0  # seconds between two signs of life, of a replica that is ready
_BEAT_OF_OTHERS = 0.1
_TOGETHER = 0.01  # seconds: what comes within them is told together


@dataclass(frozen=True)
class Forwarded:
    """A request on its way to a replica. Its headers have no key and no cookie."""

    number: int
    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    client: str
    owner: str
    weight: float
    shares: bool = False

    @property
    def scope(self) -> dict[str, Any]:
        """As ASGI wants it."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.raw_path,
            "root_path": "",
            "query_string": self.query,
            "headers": list(self.headers),
            "client": None,
            "server": None,
        }


@dataclass(frozen=True)
class Part:
    """What the application has sent of one response. `tokens`: at the end, what the request took."""

    number: int
    messages: tuple[Message, ...]
    tokens: int | None = None


@dataclass(frozen=True)
class State:
    """What a replica can do: the models that are loaded, or why requests are refused, as for ApiError."""

    models: tuple[str, ...] = ()
    message: str = ""
    code: str = ""
    retry_after: float | None = None

    @property
    def ready(self) -> bool:
        return not self.code


@dataclass(frozen=True)
class News:
    """What a replica says of itself, and the parts of all responses since it said so before."""

    state: State
    parts: tuple[Part, ...]


class Caller(Client):
    """The holder of a key, for one request: limits are the front's to hold, and it is told what was used."""

    def __init__(self, request: Forwarded) -> None:
        super().__init__(request.client, KeyLimits(weight=request.weight), owner=request.owner)
        self.shares = request.shares
        self.tokens = 0

    def leave(self, tokens: int, reserved: int = 0) -> None:
        super().leave(tokens, reserved)
        self.tokens += tokens


class Replica:
    """What Ray Serve runs. `local`: on the front's machine, and reachable from there only."""

    async def __init__(  # type: ignore[misc]  # Ray Serve waits for it, in the loop that runs everything else
        self, paths: Mapping[str, Path], config: ServeConfig, loading: Mapping[str, Any], local: bool
    ) -> None:
        write_log()
        if local:
            _listen_on_loopback()
        self._registry = Registry(paths, config, loading)
        self._app = create_api(self._registry, config)
        self._life = self._app.router.lifespan_context(self._app)
        self._gone: dict[int, asyncio.Event] = {}  # of each request, set when nobody waits for it any more
        self._left: deque[int] = deque(maxlen=1024)  # of whom that was told before they came
        self._tasks: set[asyncio.Task[None]] = set()
        self._parts: list[Part] = []  # not told yet
        self._something = asyncio.Event()
        await self._life.__aenter__()

    async def begin(self, request: Forwarded) -> None:
        """Answer a request; the parts of the response are in the news."""
        task = asyncio.create_task(self._answer(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def leave(self, number: int) -> None:
        """Whoever sent this request does not wait for it any more."""
        if number in self._gone:
            self._gone[number].set()
        else:
            self._left.append(number)

    async def follow(self) -> AsyncGenerator[News, None]:
        """All that is to be told, as long as the process lives: at once, but what comes soon after it together.

        Many streams so cost as much as one. Whoever follows anew has given up what was asked for before.
        """
        for gone in self._gone.values():
            gone.set()
        self._parts.clear()
        while True:
            parts, self._parts = tuple(self._parts), []
            self._something.clear()
            state = self._state()
            yield News(state, parts)
            await asyncio.sleep(_TOGETHER)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_BEAT if state.ready else _BEAT_OF_OTHERS):
                    await self._something.wait()

    async def _answer(self, request: Forwarded) -> None:
        """As a server does: what the application receives, and what becomes of what it sends."""
        gone = self._gone[request.number] = asyncio.Event()
        if request.number in self._left:
            gone.set()
        caller = Caller(request)
        arrived, last = False, list[Message]()

        async def receive() -> Message:
            nonlocal arrived
            if not arrived:
                arrived = True
                return {"type": "http.request", "body": request.body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                last.append(message)  # held back until it is known what the request took
            else:
                self._tell(Part(request.number, (message,)))

        try:
            await self._app(request.scope | {"state": {"client": caller}}, receive, send)
        except Exception:  # which was told with a 500
            log.exception("%r failed", request.path)  # decoded: it may have a line feed
        finally:
            del self._gone[request.number]
            self._tell(Part(request.number, tuple(last), caller.tokens))

    def _tell(self, part: Part) -> None:
        self._parts.append(part)
        self._something.set()

    def _state(self) -> State:
        try:
            return State(tuple(models_ready(self._registry)))
        except ApiError as error:
            return State((), str(error), error.code or "not_ready", error.retry_after)

    async def figures(self) -> bytes:
        """Prometheus' text form."""
        page: bytes = self._app.state.metrics.page()
        return page

    async def drain(self, seconds: float) -> None:
        """Take nothing more; wait for what runs, then end it, and close all files."""
        await self._registry.drain(seconds)
        await self._life.__aexit__(None, None, None)

    async def check_health(self) -> None:
        """Ray Serve starts a replica again when this raises: the thread of a model has ended."""
        dead = [model.name for model in self._registry.loaded if not model.driver.alive]
        if dead and not self._registry.draining:
            raise RuntimeError(f"the model {dead[0]} has stopped")


def _listen_on_loopback() -> None:
    """Keep the port that Ray Serve opens in every replica, for calls that Herd does not use, off the network.

    It is bound to all addresses and there is no option for it (seen in Ray 2.60). It asks for the cluster's token in
    any case; where a later version names things differently, that alone protects it, and the log says so.
    """
    from ray.serve._private import replica

    bind = getattr(replica, "add_port_to_grpc_server", None)
    if bind is None:
        log.warning("Ray Serve's own port in a replica may be open to the network; it asks for a token")
        return
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))
