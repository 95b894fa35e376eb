"""Running the application: a socket, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from herd.errors import ResourceError, UsageError
from herd.serve.app import create_app
from herd.serve.config import ServeConfig
from herd.serve.keys import Keys
from herd.serve.registry import Registry, log_failure
from herd.serve.request_log import RequestLog
from herd.serve.security import is_local
from herd.serve.sse import UNREAD

log = logging.getLogger("herd.serve")
Drain = Callable[[float], Awaitable[None]]
_BACKLOG = 512
_FIRST_REQUEST = 30.0  # seconds
_KERNEL_BUFFER = 256 << 10  # bytes; it tells of progress when a third of it is free, which a slow reader must reach
_FILES = 16_384  # that the process may have open, if the system lets it


def check_exposure(config: ServeConfig, keys: Keys) -> None:
    """Refuse to serve others without asking for a key; warn where that is wanted."""
    if is_local(config.host) or keys.needed:
        return
    if not config.insecure:
        raise UsageError(
            "others could use this server without a key",
            value=config.host,
            allowed="127.0.0.1, ::1 or localhost without a key",
            fix="add --api-key KEY, or --insecure if that is what you want",
        )
    log.warning("whoever reaches %s may use this server: --insecure, and no key", config.host)


def listen(config: ServeConfig) -> socket.socket:
    """A bound socket. Raises ResourceError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio switches Nagle's algorithm off where it sees that this is TCP; else a token may wait 40 ms for another.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((config.host.strip("[]"), config.port))
    except OSError as error:
        found.close()
        reason = error.strerror or str(error)
        where = f"{config.host}:{config.port}"
        no_such_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        fix = f"choose another {'--host' if no_such_host else '--port'}"
        raise ResourceError(f"the address cannot be used ({reason})", value=where, fix=fix) from None
    return found


def connection_limit() -> int:
    """Half of the files that this process may have open, of which it may have as many as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted) // 2


class Connection(H11Protocol):
    """A connection that must bring a request soon and take what it is sent, or is cut; of too many, the oldest that
    does neither makes way.

    What a client has not taken lies in the transport's buffer, also while that is being closed. The buffer's limit is
    0: the transport tells when anything is left in it and when nothing is, and nothing more is sent in between.
    """

    most = 512
    """Connections at a time."""
    write_timeout = 60.0
    """Seconds for which something may wait for a client that takes it too slowly."""
    least_rate = 8 << 10
    """Bytes that a client must take in each second for which something waits for it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._patience = self.loop.call_later(_FIRST_REQUEST, self._cut_if_silent)
        self._taking: asyncio.TimerHandle | None = None
        self._left = 0  # bytes in the buffer when that was looked at
        self._looked = 0.0
        self._waited = 0.0  # seconds for which there were some before that, since the rate was looked at
        self._taken = 0  # bytes meanwhile
        self._is_cut = False
        transport.set_write_buffer_limits(high=0)
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _KERNEL_BUFFER)
        if len(self.connections) > self.most:
            others = [each for each in self.connections if isinstance(each, Connection) and each.can_go]
            min(others, key=lambda each: each._since).cut()  # this one, if all others wait for answers

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._patience.cancel()
        self._stop_watching()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._left, self._looked = self.transport.get_write_buffer_size(), self.loop.time()
        self._taking = self.loop.call_later(max(0.0, self.write_timeout - self._waited), self._cut_if_unread)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching()
        self._waited += self.loop.time() - self._looked
        self._taken += self._left

    @property
    def can_go(self) -> bool:
        """Nobody waits for an answer on it, or the client does not take it as it comes. A request whose body has not
        come has asked for nothing yet."""
        waits = self.cycle is not None and not (self.cycle.response_complete or self.cycle.more_body)
        return not self._is_cut and (not waits or self.flow.write_paused or self.transport.is_closing())

    def cut(self) -> None:
        """End it now, with all that is left in the buffer."""
        self._is_cut = True
        self.transport.abort()

    def _cut_if_silent(self) -> None:
        if self.cycle is None:
            self.cut()

    def _cut_if_unread(self) -> None:
        left = self.transport.get_write_buffer_size()
        if self._taken + self._left - left < self.write_timeout * self.least_rate:
            if self.scope is not None:
                self.scope["state"][UNREAD] = True
            self.cut()
        else:
            self._left, self._looked, self._waited, self._taken = left, self.loop.time(), 0.0, 0
            self._taking = self.loop.call_later(self.write_timeout, self._cut_if_unread)

    def _stop_watching(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None


def settings_for(app: ASGIApp, config: ServeConfig) -> uvicorn.Config:
    """How uvicorn runs the application."""

    class Timed(Connection):
        write_timeout = config.write_timeout

    return uvicorn.Config(
        RequestLog(app) if config.log_requests else app,
        host="127.0.0.1",
        port=0,
        loop="asyncio",  # also where another package has brought another one
        http=Timed,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=16 << 10,
    )


class Server(uvicorn.Server):
    """uvicorn, which on the first signal lets answers end, and on the second one does not."""

    def __init__(self, config: uvicorn.Config, drain: Drain, grace: float, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._until_drained = drain
        self._grace = grace
        self._on_start = on_start
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for each signal that ends a server, by the handlers that uvicorn installs, while the loop runs."""
        if self._draining is None:
            asyncio.get_running_loop().call_soon_threadsafe(self._drain)
        else:  # whatever still runs, loading a model included
            os._exit(130)

    def _drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        log.info("stopping: running answers have %g s", self._grace)
        try:
            await self._until_drained(self._grace)
        finally:
            self.should_exit = True


def serve(
    registry: Registry,
    config: ServeConfig,
    keys: Keys,
    *,
    on_start: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until a signal comes. `on_start` gets the address, once requests are taken.

    Raises what was wrong with the first model if that cannot be loaded: there is nothing to serve then.
    """
    failed: list[BaseException] = []

    def end(name: str, error: BaseException) -> None:
        if name != registry.first or registry.loaded:
            log_failure(name, error)
        else:
            failed.append(error)
            signal.raise_signal(signal.SIGTERM)

    registry.on_failure = end
    with listening(config, keys) as bound:
        run(create_app(registry, config, keys), registry.drain, config, bound, on_start)
    if failed:
        raise failed[0]
    if registry.loading:  # native code that is running cannot be torn down
        logging.shutdown()
        os._exit(0)


@contextlib.contextmanager
def listening(config: ServeConfig, keys: Keys) -> Iterator[socket.socket]:
    """The socket, for the time of a block. Raises UsageError or ResourceError when there cannot be one."""
    check_exposure(config, keys)
    bound = listen(config)
    try:
        yield bound
    finally:
        bound.close()


def run(app: ASGIApp, drain: Drain, config: ServeConfig, bound: socket.socket, on_start: Callable[[str], None]) -> None:
    """Serve an application until a signal comes; `drain` gets the seconds that running answers have then."""
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    Connection.most = connection_limit()
    server = Server(settings_for(app, config), drain, config.grace, lambda: on_start(f"http://{shown}:{port}"))
    server.run(sockets=[bound])
