"""A request's body: read within its bounds, parsed, and checked field by field, so that nothing is silently ignored."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import orjson
import pydantic
from starlette.requests import ClientDisconnect, Request

from herd.config import Config
from herd.errors import near
from herd.serve.config import ServeConfig
from herd.serve.errors import ApiError
from herd.serve.security import too_large


class Body(Config):
    """Base of what requests may say: types as in JSON, unknown fields are errors.

    `UNSUPPORTED` has fields of the protocol that exist and are not there yet, with what to do instead.
    """

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    UNSUPPORTED: ClassVar[Mapping[str, str]] = {}


_MEMBERS = 20_000  # of all objects, and lists; ids in lists do not count
B = TypeVar("B", bound=Body)
H = TypeVar("H", bound=Callable[..., Any])


def takes(kind: type[Body]) -> Callable[[H], H]:
    """Note what a handler reads, for the API's description."""

    def mark(handler: H) -> H:
        handler.body = kind  # type: ignore[attr-defined]
        return handler

    return mark


async def read_body(request: Request, config: ServeConfig, kind: type[B]) -> B:
    """The body as `kind`. Raises ApiError with the field at fault."""
    return parse_body(await read_json(request, config), kind)


async def read_json(request: Request, config: ServeConfig) -> dict[str, Any]:
    """The object that a body is."""
    raw = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout):
            async for part in request.stream():
                raw += part
                if len(raw) > config.max_body_bytes:
                    raise too_large(config.max_body_bytes)
    except TimeoutError:
        raise ApiError(408, "the request did not arrive in time", code="request_timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away", code="disconnected") from None
    try:
        data = orjson.loads(bytes(raw))
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    check_shape(data, config.max_json_depth)
    return data


def check_shape(data: object, max_depth: int) -> None:
    """Refuse what lies too deep in each other, and more members than any request has: each could be an error."""
    level: list[Any] = [data]
    members = 0
    for _ in range(max_depth):
        inside: list[Any] = []
        for value in level:
            members += len(value) if isinstance(value, dict) else 1
            inside += [v for v in (value.values() if isinstance(value, dict) else value) if isinstance(v, dict | list)]
        if members > _MEMBERS:
            raise ApiError(400, f"a request has {_MEMBERS:,} members at most", code="too_many_members")
        level = inside
        if not level:
            return
    raise ApiError(400, f"lists and objects lie in each other {max_depth} deep at most", code="too_deep")


def parse_body(data: Mapping[str, Any], kind: type[B], where: str = "") -> B:
    """`data` as `kind`; `where` stands in front of the names of fields in errors."""
    for name, advice in kind.UNSUPPORTED.items():
        if data.get(name) is not None:
            raise ApiError(
                400, f"{where}{name} is not supported; {advice}", param=where + name, code="unsupported_parameter"
            )
    try:
        return kind.model_validate({name: value for name, value in data.items() if name not in kind.UNSUPPORTED})
    except pydantic.ValidationError as error:
        raise _first_of(error, kind, where) from None


def _first_of(error: pydantic.ValidationError, kind: type[Body], where: str) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # Of a union all members complain, each under a name of its own in the path, which is none of the request's.
    path = [part for part in first["loc"] if not isinstance(part, str) or (part.isidentifier() and part != "str")]
    param = (where + ".".join(str(part) for part in path))[:200]
    if first["type"] == "extra_forbidden":
        known = f"; {near(str(first['loc'][-1])[:100], kind.model_fields)}" if len(first["loc"]) == 1 else ""
        return ApiError(400, f"there is no field {param[:200]!r}{known}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_parameter")
    message = re.sub("^Input should be ", "allowed is ", first["msg"].removeprefix("Value error, "))
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")
