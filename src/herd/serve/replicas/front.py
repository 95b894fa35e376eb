"""The process that clients reach: it knows who asks, holds the limits, and sends requests on to the replicas.

It has no model. Whether it lives, its page and its description it answers itself; everything else goes to one replica,
which the router chooses, and what that one sends goes on to the client as it comes. A request whose replica dies before
it has taken it is tried once more on another one. One that it had taken is not: it may be what the replica died of, and
so would the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from herd.serve.api.body import body_of, parse_json
from herd.serve.api.context import admit, admit_prompts
from herd.serve.api.fields import each_of
from herd.serve.app import ROUTES, Handler, application, description, health, page
from herd.serve.config import ServeConfig
from herd.serve.errors import ApiError
from herd.serve.keys import Client, Keys
from herd.serve.metrics import Metrics
from herd.serve.replicas.cluster import Cluster, check_replicas
from herd.serve.replicas.figures import merged
from herd.serve.replicas.link import Exchange, Link, ReplicaLost, replica_lost
from herd.serve.replicas.prefix_router import PrefixRouter, beginning
from herd.serve.replicas.relay import Relay
from herd.serve.replicas.replica import Forwarded
from herd.serve.security import Gate
from herd.serve.server import listening, run
from herd.serve.sse import while_connected

_SEVERAL = {"/v1/completions": "prompt", "/v1/embeddings": "input"}  # fields that may have many prompts, or texts
_TRIES = 2
_PATIENCE = 5.0  # seconds beyond the grace, for what the replicas have to say at the end
_SECRET = frozenset({b"authorization", b"x-api-key", b"cookie"})


@dataclass(frozen=True)
class _Facts:
    """What the front must know of a body."""

    prompts: int = 1
    beginning: bytes = b""


class Front:
    """See above. `handles`: Ray Serve's, one for each replica. `app` is the application without its gate."""

    def __init__(self, handles: Sequence[Any], config: ServeConfig) -> None:
        self._config = config
        self._router = PrefixRouter(len(handles))
        self._links = [Link(number, handle, self._router.forget) for number, handle in enumerate(handles)]
        self._metrics = Metrics(lambda: ())
        self._number = itertools.count()
        self._open = 0  # requests that have not ended
        self._ending: set[asyncio.Task[None]] = set()
        self._draining = False
        own = {"/": page, "/health": health, "/openapi.json": description}
        own |= {"/ready": self._ready, "/metrics": self._figures}
        routes = [(method, path, own.get(path) or self._passing_on(path, of)) for method, path, of in ROUTES]
        self.app = application(routes, config, self._metrics, self._life)

    async def drain(self, seconds: float) -> None:
        """Take nothing more; what runs has so many seconds, and is told its end by its replica."""
        self._draining = True
        end = time.monotonic() + seconds + _PATIENCE
        calls = [link.call("drain", seconds) for link in self._links if link.state is not None]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds + _PATIENCE):
                await asyncio.gather(*calls, return_exceptions=True)
        while self._open and time.monotonic() < end:
            await asyncio.sleep(0.02)

    @contextlib.asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        following = [asyncio.create_task(link.follow()) for link in self._links]
        yield
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)

    async def _ready(self, request: Request) -> Response:
        """Requests are answered: each replica has been ready, and one is."""
        if self._draining:
            raise _stopping()
        late = next((link for link in self._links if not link.was_ready), None)
        ready = [link.state for link in self._links if link.ready and link.state is not None]
        if late is not None or not ready:
            raise _why(late or self._links[0])
        models = sorted({model for state in ready for model in state.models})
        body = {"status": "ready", "models": models, "replicas": len(ready)}
        return Response(orjson.dumps(body), media_type="application/json")

    async def _figures(self, request: Request) -> Response:
        """Prometheus' text form: the front's own figures, and those of each replica that can be reached."""
        reached = [link for link in self._links if link.state is not None]
        pages = await asyncio.gather(*(link.call("figures") for link in reached), return_exceptions=True)
        told = {link.number: got for link, got in zip(reached, pages, strict=True) if isinstance(got, bytes)}
        page = merged(self._metrics.page(), told)
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    def _passing_on(self, path: str, handler: Handler) -> Handler:
        """What a route does here: whoever asks for text is counted, and all go to a replica."""
        body = getattr(handler, "body", None)
        counts = body is not None or getattr(handler, "counted", False)

        async def pass_on(request: Request) -> Response:
            client: Client = request.scope["state"]["client"]
            if counts:
                admit(client)
            async with contextlib.AsyncExitStack() as reading:  # it ends when the response begins
                try:
                    raw, facts = await reading.enter_async_context(body_of(request, self._config)), _Facts()
                    if body is not None:
                        facts = await parse_json(request, raw, self._config, lambda data: _facts_of(path, data))
                        admit_prompts(client, facts.prompts, _SEVERAL.get(path))
                    if counts and self._draining:
                        raise _stopping()
                except BaseException:
                    if counts:
                        client.leave(0)
                    raise
                return await send_on(request, client, raw, facts)

        async def send_on(request: Request, client: Client, raw: bytes, facts: _Facts) -> Response:
            forwarded = Forwarded(
                number=next(self._number),
                method=request.method,
                path=request.scope["path"],
                raw_path=request.scope["raw_path"],
                query=request.scope["query_string"],
                headers=tuple(header for header in request.scope["headers"] if header[0] not in _SECRET),
                body=raw,
                client=client.name,
                owner=client.owner,
                weight=client.limits.weight,
                shares=client.shares,
            )
            start = time.perf_counter()

            def close(tokens: int) -> None:
                self._open -= 1
                if counts:
                    client.leave(tokens)
                    self._metrics.seconds(path, time.perf_counter() - start)

            self._open += 1
            return await self._send_on(request, forwarded, facts.beginning, close)

        pass_on.__name__, pass_on.__doc__ = handler.__name__, handler.__doc__
        return pass_on

    async def _send_on(
        self, request: Request, forwarded: Forwarded, beginning: bytes, close: Callable[[int], None]
    ) -> Response:
        """The response of a replica, as soon as it begins. `close` is called at its end, with what it took."""
        tried: set[int] = set()
        exchange: Exchange | None = None
        try:
            while True:
                link = self._choose(beginning, tried)
                exchange = link.send(forwarded)
                try:
                    first = await while_connected(request.receive, exchange.next())
                    return Relay(exchange, first, functools.partial(self._end, exchange, close))
                except ReplicaLost:
                    taken = await exchange.taken()
                    await exchange.finish()
                    exchange = None
                    tried.add(link.number)
                    if taken or len(tried) == _TRIES:
                        raise replica_lost() from None
        except BaseException:
            self._end(exchange, close)
            raise

    def _choose(self, beginning: bytes, tried: set[int]) -> Link:
        """A replica that is ready, else one that says itself why it is not."""
        reached = [link for link in self._links if link.state is not None and link.number not in tried]
        links = [link for link in reached if link.ready] or reached
        if not links:
            raise replica_lost() if tried else _why(self._links[0])
        return self._links[self._router.choose(beginning, {link.number: link.load for link in links})]

    def _end(self, exchange: Exchange | None, close: Callable[[int], None]) -> None:
        """A request is over, here at least: `close` is called when its replica has said what it took."""
        if exchange is None:
            close(0)
        elif exchange.whole:
            exchange.forget()
            close(exchange.tokens)
        else:
            task = asyncio.create_task(_give_up(exchange, close))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)


async def _give_up(exchange: Exchange, close: Callable[[int], None]) -> None:
    await exchange.finish()
    close(exchange.tokens)


def _facts_of(path: str, data: Mapping[str, Any]) -> _Facts:
    field = _SEVERAL.get(path)
    given = None if field is None else data.get(field)
    # What is of another type is the replica's to refuse.
    prompts = len(each_of(given)) if given and isinstance(given, str | list) else 1
    return _Facts(prompts, beginning(data))


def _why(link: Link) -> ApiError:
    """Why a replica does not answer."""
    if link.state is None or link.state.ready:
        return ApiError(503, "the replicas are being started", code="loading", retry_after=2)
    return ApiError(503, link.state.message, code=link.state.code, retry_after=link.state.retry_after)


def _stopping() -> ApiError:
    return ApiError(503, "the server is about to stop", code="draining", retry_after=5)


def serve_replicas(
    paths: Mapping[str, Path],
    config: ServeConfig,
    keys: Keys,
    loading: Mapping[str, Any],
    count: int,
    *,
    on_start: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve with `count` replicas until a signal comes; `loading` has keyword arguments of LLM.

    Raises UsageError, MissingDependency, and ResourceError where the address or Ray cannot be had.
    """
    check_replicas(count, config, loading)
    with listening(config, keys) as bound, Cluster(paths, config, loading, count) as cluster:
        front = Front(cluster.handles, config)
        run(Gate(front.app, config, keys), front.drain, config, bound, on_start)
