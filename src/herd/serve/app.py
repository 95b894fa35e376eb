"""The server as an ASGI application: every route, behind one gate."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from herd.errors import HerdError
from herd.serve.api.answer_types import Health, Ready, gives
from herd.serve.api.chat import chat_completions
from herd.serve.api.completions import completions
from herd.serve.api.messages import count_tokens, messages
from herd.serve.api.openapi import describe
from herd.serve.api.responses import delete_response, get_response, input_items, responses
from herd.serve.api.tokens import detokenize, embeddings, model, models, tokenize
from herd.serve.bodies import Answers, Bodies
from herd.serve.config import ServeConfig
from herd.serve.errors import ApiError, as_api_error, error_response
from herd.serve.keys import Keys
from herd.serve.metrics import Metrics, path_of
from herd.serve.page import chat_page
from herd.serve.pools import Pools
from herd.serve.registry import Registry
from herd.serve.security import Gate
from herd.serve.sse import ClientGone, EventStream
from herd.serve.store import Store

log = logging.getLogger("herd.serve")
Handler = Callable[[Request], Awaitable[Response]]

_PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
)


@gives(Health)
async def health(request: Request) -> Response:
    """The process lives."""
    return Response(b'{"status":"ok"}', media_type="application/json")


@gives(Ready)
async def ready(request: Request) -> Response:
    """Requests are answered; 503 while a model is loaded, and once the server is about to stop."""
    models = models_ready(request.app.state.registry)
    return Response(orjson.dumps({"status": "ready", "models": models}), media_type="application/json")


def models_ready(registry: Registry) -> list[str]:
    """The models that are loaded. Raises ApiError when requests are not answered."""
    if registry.draining:
        raise ApiError(503, "the server is about to stop", code="draining", retry_after=5)
    if not registry.loaded:
        raise registry.not_there(registry.first)
    dead = [model.name for model in registry.loaded if not model.driver.alive]
    if dead:
        raise ApiError(503, f"the model {dead[0]} has stopped", code="stopped")
    return [model.name for model in registry.loaded]


@gives("application/json")
async def description(request: Request) -> Response:
    """The API in OpenAPI's form, made of the same types that requests are checked against."""
    return Response(orjson.dumps(describe(ROUTES)), media_type="application/json")


@gives("text/plain")
async def metrics(request: Request) -> Response:
    """Prometheus' text form."""
    found: Metrics = request.app.state.metrics
    return Response(found.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


@gives("text/html")
async def page(request: Request) -> Response:
    """The chat page, which may run its own script and fetch from here, and nothing else."""
    nonce = secrets.token_urlsafe(16)
    headers = {"content-security-policy": _PAGE_POLICY.format(nonce=nonce)}
    return Response(chat_page(nonce), 200, headers, "text/html")


ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/", page),
    ("GET", "/health", health),
    ("GET", "/ready", ready),
    ("GET", "/metrics", metrics),
    ("GET", "/openapi.json", description),
    ("GET", "/v1/models", models),
    ("GET", "/v1/models/{name:path}", model),
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/responses", responses),
    ("GET", "/v1/responses/{id}", get_response),
    ("DELETE", "/v1/responses/{id}", delete_response),
    ("GET", "/v1/responses/{id}/input_items", input_items),
    ("POST", "/v1/embeddings", embeddings),
    ("POST", "/v1/messages", messages),
    ("POST", "/v1/messages/count_tokens", count_tokens),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
)


def create_app(registry: Registry, config: ServeConfig, keys: Keys) -> ASGIApp:
    """The whole application, behind its gate."""
    return Gate(create_api(registry, config), config, keys)


def create_api(registry: Registry, config: ServeConfig) -> Starlette:
    """All routes, without the gate. Models are loaded when it starts, and closed when it ends."""
    counts = Metrics(lambda: registry.loaded)
    store = None if config.store is None else Store(config.store)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        registry.load(registry.first)
        yield
        await registry.drain(0.0)
        app.state.pools.close()
        if store is not None:
            store.close()

    app = application(ROUTES, config, counts, lifespan)
    app.state.registry, app.state.store = registry, store
    registry.on_gaps = counts.gaps
    return app


def application(
    routes: Sequence[tuple[str, str, Handler]],
    config: ServeConfig,
    counts: Metrics,
    lifespan: Callable[[Starlette], contextlib.AbstractAsyncContextManager[None]],
) -> Starlette:
    """An application of these routes, whose responses are counted and whose errors have the usual form."""
    app = Starlette(
        routes=[
            Route(path, _endpoint(handler, path.replace(":path", ""), counts), methods=[method])
            for method, path, handler in routes
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )
    app.state.config, app.state.metrics = config, counts
    app.state.bodies, app.state.answers = Bodies(config), Answers()
    app.state.pools = Pools()
    return app


def _endpoint(handler: Handler, path: str, counts: Metrics) -> Handler:
    """A handler whose errors become responses, and whose call is closed when there is no response to do it."""

    async def answer(request: Request) -> Response:
        try:
            response = await handler(request)
        except ClientGone:
            _close_call(request)
            counts.response(path, 499)  # as nginx counts them; nobody reads it
            return Response(status_code=499)
        except Exception as error:
            _close_call(request)
            told = as_api_error(error)
            if told.code == "internal_error" or not isinstance(error, HerdError):
                log.error("%s failed", path, exc_info=error)
            counts.response(path, told.status)
            return error_response(told, path)
        if not isinstance(response, EventStream):  # which counts itself, at its end
            counts.response(path, response.status_code)
        return response

    answer.__name__ = handler.__name__
    return answer


def _close_call(request: Request) -> None:
    """No response will do it."""
    call = getattr(request.state, "call", None)
    if call is not None:
        call.close()


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    what = {404: f"there is no {request.url.path[:200]!r} here", 405: "not with this method"}
    message = what.get(error.status_code, str(error.detail))
    counts: Metrics = request.app.state.metrics
    counts.response(path_of(request.app, request.scope), error.status_code)
    response = error_response(ApiError(error.status_code, message, code="no_such_route"), request.scope["path"])
    if error.status_code == 405:
        response.headers["allow"] = ", ".join(_methods_of(request))
    return response


def _methods_of(request: Request) -> list[str]:
    """With which a path is there. Each method has a route of its own; Starlette names those of one."""
    here = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
    return sorted({method for route in here for method in route.methods})
