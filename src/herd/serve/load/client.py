"""One request at a time over HTTP/1.1, each on a connection of its own, with the time at which every byte came.

Bytes are looked at where the event loop hands them over, so that no task has to be woken before a time is taken.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import ssl
import time
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from herd.errors import MissingDependency, ResourceError, UsageError
from herd.serve.load.figures import REFUSALS, Record

try:
    import h11
except ImportError:  # pragma: no cover
    raise MissingDependency("h11", extra="serve") from None

Endpoint = Literal["chat", "completions"]
PATHS: dict[str, str] = {"chat": "/chat/completions", "completions": "/completions"}

now = time.monotonic  # the event loop's own clock
CONNECT_SECONDS = 10.0  # to find out whether a server is there at all
GRACE = 1.0  # for the connection's proper end after [DONE]
MAX_LINE = 4 << 20  # bytes of one event
MAX_BODY = 1 << 20  # bytes of an answer that is no stream


@dataclass(frozen=True)
class Target:
    """A server whose address is known and answers. `base` is the path in front of /models and /chat/completions."""

    host: str
    port: int
    base: str
    address: str
    tls: ssl.SSLContext | None = None
    api_key: str | None = None

    @property
    def url(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://{self._authority()}{self.base}"

    @property
    def local(self) -> bool:
        """Whether it is this machine."""
        return ipaddress.ip_address(self.address).is_loopback

    def _authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (80 if self.tls is None else 443) else f"{host}:{self.port}"

    def request(self, method: str, path: str, body: bytes = b"") -> tuple[h11.Connection, bytes]:
        """A connection's state after the request, and the bytes to send."""
        headers = [("Host", self._authority()), ("User-Agent", "herd-bench"), ("Connection", "close")]
        if self.api_key:
            headers.append(("Authorization", f"Bearer {self.api_key}"))
        if body:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 16)
        try:
            parts = [http.send(h11.Request(method=method, target=self.base + path, headers=headers))]
        except (h11.LocalProtocolError, ValueError) as error:
            raise UsageError(f"neither URL nor key may hold what HTTP does not allow there ({error})") from None
        parts += [http.send(h11.Data(data=body)) if body else b"", http.send(h11.EndOfMessage())]
        return http, b"".join(part or b"" for part in parts)


class Exchange(asyncio.Protocol):
    """A request and its answer. `done` ends when the answer has; `failed` then says in words what was wrong with it."""

    def __init__(self, http: h11.Connection, payload: bytes) -> None:
        self._http = http
        self._payload = payload
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.WriteTransport | None = None
        self.connected: float | None = None
        self.now = 0.0
        self.status: int | None = None
        self.headers: dict[bytes, bytes] = {}
        self.body = bytearray()
        self.failed: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport
        self.connected = now()
        transport.write(self._payload)

    def data_received(self, data: bytes) -> None:
        self.now = now()
        self._http.receive_data(data)
        self._read()

    def eof_received(self) -> None:
        self.now = now()
        self._http.receive_data(b"")
        self._read()

    def connection_lost(self, error: Exception | None) -> None:
        self.end(f"the connection was lost: {error}" if error else "the connection was closed")

    def end(self, failed: str | None = None) -> None:
        if not self.done.done():
            self.failed = failed
            self.done.set_result(None)

    def _read(self) -> None:
        try:
            while not self.done.done():
                event = self._http.next_event()
                if isinstance(event, h11.Data):
                    self.take(bytes(event.data))
                elif isinstance(event, h11.Response):
                    self.status = event.status_code
                    self.headers = {name: value for name, value in event.headers}
                elif isinstance(event, h11.EndOfMessage):
                    self.end()
                elif not isinstance(event, h11.InformationalResponse):
                    return
        except h11.RemoteProtocolError as error:
            self.end(f"not HTTP/1.1: {error}" if self.status is None else f"cut off: {error}")

    def take(self, data: bytes) -> None:
        """Part of the answer's body."""
        self.body += data
        if len(self.body) > MAX_BODY:
            self.end("the answer is endless")

    def message(self) -> str:
        """What an answer that is no stream says: the error's message, or its first line."""
        try:
            data = json.loads(self.body)
            error = data.get("error", data) if isinstance(data, dict) else data
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, RecursionError):
            text = self.body.decode(errors="replace")
        return " ".join(text.split())[:200]


class EventStream:
    """Server-sent events, as far as these servers use them: the data of each event, whatever the pieces it comes in."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """Data of the events that this piece completes; ValueError for a line that does not end."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > MAX_LINE:
            raise ValueError("an event is endless")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith((b"data:", b"error:")):  # llama.cpp has reported errors in a field of that name
                self._data.append(line.partition(b":")[2].strip())
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


class Answer(Exchange):
    """A streamed completion, checked while it comes and written into its record."""

    def __init__(self, http: h11.Connection, payload: bytes, record: Record, start: float) -> None:
        super().__init__(http, payload)
        self._record = record
        self._start = start
        self._events = EventStream()
        self.complete = False

    def take(self, data: bytes) -> None:
        if self.status != 200 or not self.headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            super().take(data)
            return
        try:
            for event in self._events.feed(data):
                if not self.complete:
                    self._see(event)
        except ValueError as error:
            self.end(str(error))

    def _see(self, data: bytes) -> None:
        record, moment = self._record, self.now - self._start
        if data == b"[DONE]":
            if record.finish_reason is None:
                raise ValueError("[DONE] without a finish_reason")
            record.ended = moment
            self.complete = True
            asyncio.get_running_loop().call_later(GRACE, self.end)
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError("an event is not JSON") from None
        choices = _choices(event)
        if choices is None:
            self.body += data
            raise ValueError(f"an event is no piece of an answer: {self.message()}")
        for choice in choices:
            if not isinstance(choice, dict):
                raise ValueError("a choice is no object")
            if _has_text(choice):
                if record.finish_reason is not None:
                    raise ValueError("text after the finish_reason")
                record.events.append(moment)
            if choice.get("finish_reason"):
                record.finish_reason = str(choice["finish_reason"])[:40]
                record.finished = moment
        if isinstance(usage := event.get("usage"), dict):
            details = usage.get("prompt_tokens_details")
            record.tokens_in = _count(usage.get("prompt_tokens"))
            record.usage_tokens = _count(usage.get("completion_tokens")) or None  # 0 is said where nobody counted
            record.cached_tokens = _count(details.get("cached_tokens")) if isinstance(details, dict) else None

    def judge(self) -> None:
        """What became of the request, once `done`."""
        record, status = self._record, self.status
        record.status = status
        if (after := self.headers.get(b"retry-after")) is not None:
            record.retry_after = after.decode("latin-1")[:40]
        if status is None:
            record.outcome, record.detail = "connection", self.failed or "no answer"
        elif status != 200:
            record.outcome, record.detail = ("refused" if status in REFUSALS else "http_error"), self.message()
        elif self.complete:  # whatever became of the connection afterwards
            record.outcome = "ok"
            return
        elif record.finish_reason is not None and not self.failed:  # HTTP's own end, of a server that says no [DONE]
            record.outcome, record.ended = "ok", self.now - self._start
            return
        elif self.body and not self.failed:
            record.outcome, record.detail = "broken", "the answer is not a stream of events"
        else:
            record.outcome, record.detail = "broken", self.failed or "the stream ended without a finish_reason"
        record.ended = now() - self._start


def _choices(event: object) -> list[Any] | None:
    """Those of an event, none beside a usage; None where it is no piece of an answer."""
    if not isinstance(event, dict) or event.get("error"):
        return None
    choices = event.get("choices")
    if choices is None and isinstance(event.get("usage"), dict):
        return []
    return choices if isinstance(choices, list) else None


def _has_text(choice: dict[str, Any]) -> bool:
    """Whether a reader gets something to read: text, reasoning, a refusal or a part of a tool call."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return bool(choice.get("text"))
    return any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "refusal", "tool_calls"))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


async def ask(target: Target, path: str, body: bytes, record: Record, start: float, timeout: float) -> None:
    """Send one request and fill in its record. Raises nothing that a server can cause; when cancelled, the record stays
    "unfinished"."""
    http, payload = target.request("POST", path, body)
    answer = Answer(http, payload, record, start)
    record.started = now() - start
    try:
        async with asyncio.timeout(timeout):
            await _converse(target, answer)
        answer.judge()
    except asyncio.CancelledError:
        record.ended = now() - start
    except TimeoutError:
        if answer.complete:  # only the connection had no end yet
            answer.judge()
        else:
            record.outcome, record.detail, record.status = "timeout", f"no end after {timeout:g} s", answer.status
            record.ended = now() - start
    except OSError as error:
        record.outcome, record.detail = "connection", error.strerror or str(error)
        record.ended = now() - start
    finally:
        record.connected = None if answer.connected is None else answer.connected - start


async def _converse(target: Target, exchange: Exchange) -> None:
    host = target.host if target.tls else None
    try:
        await asyncio.get_running_loop().create_connection(
            lambda: exchange, target.address, target.port, ssl=target.tls, server_hostname=host
        )
        await exchange.done
    finally:
        if exchange.transport is not None:
            exchange.transport.abort()


async def get(target: Target, path: str, timeout: float) -> tuple[int, Any, str]:
    """Status, JSON (None where it is none) and message of a GET."""
    exchange = Exchange(*target.request("GET", path))
    try:
        async with asyncio.timeout(timeout):
            await _converse(target, exchange)
    except TimeoutError:
        raise ResourceError(f"the server does not answer within {timeout:g} s", value=target.url + path) from None
    except OSError as error:
        raise ResourceError(f"no answer from the server ({error})", value=target.url + path) from None
    if exchange.status is None or exchange.failed:
        raise ResourceError(f"no proper answer from the server ({exchange.failed})", value=target.url + path)
    try:
        return exchange.status, json.loads(exchange.body), exchange.message()
    except (ValueError, RecursionError):
        return exchange.status, None, exchange.message()


async def locate(url: str, api_key: str | None = None) -> Target:
    """Find the server of a URL such as http://localhost:8000 or https://api.example.com/v1, and connect to it once."""
    tls, host, port, base = split(url)
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=1)  # SOCK_STREAM
    except OSError as error:
        raise UsageError(f"there is no such host ({error.strerror})", value=host) from None
    failure: Exception | None = None
    for address in dict.fromkeys(str(entry[4][0]) for entry in found):
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                context = ssl.create_default_context() if tls else None
                _, writer = await asyncio.open_connection(
                    address, port, ssl=context, server_hostname=host if tls else None
                )
            writer.close()
            return Target(host, port, base, address, context, api_key)
        except (OSError, TimeoutError) as error:
            failure = error
    reason = getattr(failure, "strerror", None) or str(failure) or f"nothing within {CONNECT_SECONDS:g} s"
    certificate = isinstance(failure, ssl.SSLCertVerificationError)
    fix = "SSL_CERT_FILE=FILE trusts the certificates of a file" if certificate else "start one: herd serve MODEL"
    raise ResourceError(f"no server answers ({reason})", value=url, fix=fix)


def split(url: str) -> tuple[bool, str, int, str]:
    """Whether it is TLS, host, port and the path of the API's root, to which "/v1" is added where it is missing."""
    with_scheme = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(with_scheme)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"this is not a URL ({error})", value=url) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise UsageError("this is not the address of a server", value=url, allowed="http://HOST:PORT or https://HOST")
    base = parts.path.rstrip("/")
    tls = parts.scheme == "https"
    return tls, parts.hostname, port or (443 if tls else 80), base if base.endswith("/v1") else f"{base}/v1"
