"""What a request must be before any handler sees it: for this host, from this page, of this key, and not too large.

One layer around all routes, so that a route nobody thought of is refused too. The order is that of what it costs:
address, origin, key, type and size.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from herd.serve.config import ServeConfig
from herd.serve.errors import ApiError, error_response
from herd.serve.keys import Keys
from herd.serve.metrics import Metrics, path_of

OPEN = frozenset({"/health"})
"""Paths that need no key: whether the process lives, and nothing else."""

_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_MAX_HEADER_BYTES = 16 << 10


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address to listen on."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Gate:
    """The layer: an ASGI application around another."""

    def __init__(self, app: Starlette, config: ServeConfig, keys: Keys) -> None:
        self._app = app
        self._config = config
        self._keys = keys
        # A web page can point a name of its own at this machine (DNS rebinding); its requests carry that name. With a
        # key such a page can do nothing, as it does not know it, so a server for others may have any name. Without one,
        # others name it by its address.
        anybody = keys.needed and not is_local(config.host) and not config.allow_hosts
        names = {*_LOCAL, config.host.strip("[]").lower(), *config.allow_hosts}
        self._hosts: Collection[str] | None = None if anybody else names
        self._by_address = not is_local(config.host)
        self._origins = frozenset(config.allow_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        guarded = self._with_headers(send, origin)
        try:
            self._check_host(headers)
            same = self._check_origin(scope, headers, origin)
            if scope["method"] == "OPTIONS" and not same:  # a browser asks before the request itself
                await _preflight(guarded, headers.get(b"access-control-request-headers", b""))
                return
            self._check_key(scope, headers)
            self._check_content(scope, headers)
        except ApiError as error:
            counts: Metrics = self._app.state.metrics
            counts.response(path_of(self._app, scope), error.status)
            await error_response(error, scope["path"])(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        if sum(len(name) + len(value) for name, value in headers.items()) > _MAX_HEADER_BYTES:
            raise ApiError(431, "the headers are too large", code="headers_too_large")
        if self._hosts is None:
            return
        host = headers.get(b"host", b"").decode("latin-1")
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name is None or not (name.lower().rstrip(".") in self._hosts or (self._by_address and _is_address(name))):
            message = f"this server does not go by the name {host[:100]!r}; --allow-host NAME adds one"
            raise ApiError(403, message, code="wrong_host")

    def _check_origin(self, scope: Scope, headers: dict[bytes, bytes], origin: str) -> bool:
        """True for requests of this server's own page, and those that no web page sends."""
        if not origin:
            # Old browsers leave it out, new ones say where a request comes from in any case.
            site = headers.get(b"sec-fetch-site", b"none")
            if site in (b"cross-site", b"same-site") and scope["method"] not in ("GET", "HEAD"):
                message = "requests of other servers' pages are refused; --allow-origin URL lets one in"
                raise ApiError(403, message, code="wrong_origin")
            return True
        own = headers.get(b"host", b"").decode("latin-1").lower()
        if origin in (f"http://{own}", f"https://{own}"):
            return True
        if origin not in self._origins:
            message = f"pages of {origin[:100]!r} may not use this server; --allow-origin URL lets them in"
            raise ApiError(403, message, code="wrong_origin")
        return False

    def _check_key(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        client = self._keys.find(headers)
        if client is None and scope["path"] not in OPEN:
            page = b"text/html" in headers.get(b"accept", b"")
            challenge = 'Basic realm="herd", charset="UTF-8"' if page else 'Bearer realm="herd"'
            raise ApiError(401, "a valid API key is needed", code="invalid_api_key", challenge=challenge)
        scope.setdefault("state", {})["client"] = client

    def _check_content(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if scope["method"] in ("GET", "HEAD", "OPTIONS", "DELETE"):
            return
        if not any(route.matches(scope)[0] is Match.FULL for route in self._app.routes):
            return  # nothing reads it; the application says what is wrong
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":  # a form of another server's page cannot say this
            raise ApiError(415, "content-type must be application/json", code="unsupported_media_type")
        if b"content-encoding" in headers and headers[b"content-encoding"].lower() != b"identity":
            raise ApiError(415, "compressed requests are not taken", code="unsupported_media_type")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._config.max_body_bytes:
            raise too_large(self._config.max_body_bytes)

    def _with_headers(self, send: Send, origin: str) -> Send:
        """Every response says how little a browser may do with it."""
        extra = list(_HEADERS)
        if origin in self._origins:
            extra = [header for header in extra if header[0] != b"cross-origin-resource-policy"]
            extra += [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"vary", b"origin"),
                (b"access-control-allow-methods", b"GET, POST, DELETE"),
                (b"access-control-expose-headers", b"retry-after"),
                (b"access-control-max-age", b"600"),
            ]

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message.get("headers", [])}
                more = [header for header in extra if header[0] not in present]
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        return guarded


def too_large(limit: int) -> ApiError:
    """For a body above `limit` bytes, whether it was announced or not."""
    return ApiError(413, f"the request is larger than {limit} bytes", code="request_too_large")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _preflight(send: Send, asked: bytes) -> None:
    """Whichever headers a page that is let in wants to send, it may."""
    await send({"type": "http.response.start", "status": 204, "headers": [(b"access-control-allow-headers", asked)]})
    await send({"type": "http.response.body", "body": b""})
