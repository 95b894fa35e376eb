"""A request's body: read within its bounds, parsed, and checked field by field, so that nothing is silently ignored."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import orjson
import pydantic
from pydantic import GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError
from starlette.requests import ClientDisconnect, Request

from herd._native import json_size
from herd.config import Config
from herd.errors import near
from herd.serve.bodies import Bodies
from herd.serve.config import ServeConfig
from herd.serve.errors import ApiError
from herd.serve.security import too_large


class Body(Config):
    """Base of what requests may say: types as in JSON, unknown fields are errors.

    `UNSUPPORTED` has fields of the protocol that exist and are not there yet, with what to do instead.
    """

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    UNSUPPORTED: ClassVar[Mapping[str, str]] = {}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _known_names_only(cls, data: Any) -> Any:
        """The first unknown name ends the check; pydantic would keep an error for each of 50,000."""
        if isinstance(data, dict):
            for name in data:
                if name not in cls.names():
                    raise PydanticCustomError(_UNKNOWN, "there is no such field", {"name": name})
        return data

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Fields that a base has, and that are not there, are no part of the API's description."""
        reference = handler(schema)
        properties = handler.resolve_ref_schema(reference).get("properties", {})
        for name in cls.UNSUPPORTED:
            properties.pop(name, None)
        return reference

    @classmethod
    @functools.cache
    def names(cls) -> dict[str, None]:
        """Of the fields, as JSON has them, in their order."""
        return dict.fromkeys(field.alias or name for name, field in cls.model_fields.items())


_AS_JSON = {"True": "true", "False": "false", "None": "null"}
# What pydantic says in words of its own, or of Python's types, in those of JSON.
_PLAINER = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "too_short": "a length of at least {min_length}",
    "too_long": "a length of at most {max_length}",
    "string_too_short": "a length of at least {min_length}",
    "string_too_long": "a length of at most {max_length}",
    "string_pattern_mismatch": "a string that matches {pattern}",
}
_UNKNOWN, _TAG = "unknown_name", "union_tag_"
NOT_THERE = "not_there"
"""Type of a validator's error for what the protocol has and Herd has not; its `ctx` has the `place` below the field."""
_MEMBERS = 50_000  # lists, objects, names and strings: 4,096 messages have 20,000
_BYTES_PER_ELEMENT = 32  # of the largest body: token ids are what a request may have a quarter of a million of
_LARGE = 1 << 14  # bytes that are parsed in a few milliseconds at most
B = TypeVar("B", bound=Body)
T = TypeVar("T")
H = TypeVar("H", bound=Callable[..., Any])


def takes(kind: type[Body]) -> Callable[[H], H]:
    """Note what a handler reads, for the API's description."""

    def mark(handler: H) -> H:
        handler.body = kind  # type: ignore[attr-defined]
        return handler

    return mark


async def read_body(request: Request, config: ServeConfig, kind: type[B]) -> B:
    """The body as `kind`. Raises ApiError with the field at fault."""
    return await read_json(request, config, lambda data: parse_body(data, kind))


async def read_json(request: Request, config: ServeConfig, check: Callable[[dict[str, Any]], T]) -> T:
    """What `check` makes of the object that a body is."""
    async with body_of(request, config) as body:
        return await parse_json(request, body, config, check)


@contextlib.asynccontextmanager
async def body_of(request: Request, config: ServeConfig) -> AsyncIterator[bytes]:
    """The body, within its bounds of size and time; for the time of the block it counts as one that is there."""
    bodies: Bodies = request.app.state.bodies
    key = request.scope["state"]["client"].name
    parts: list[bytes] = []
    size = 0
    try:
        try:
            async with asyncio.timeout(config.body_timeout):
                async for part in request.stream():
                    if size + len(part) > config.max_body_bytes:
                        raise too_large(config.max_body_bytes)
                    bodies.hold(key, len(part))
                    size += len(part)
                    parts.append(part)
        except TimeoutError:
            raise ApiError(408, "the request did not arrive in time", code="request_timeout") from None
        except ClientDisconnect:
            raise ApiError(400, "the client went away", code="disconnected") from None
        body = b"".join(parts)
        parts.clear()
        yield body
    finally:
        bodies.free(key, size)


async def parse_json(request: Request, body: bytes, config: ServeConfig, check: Callable[[dict[str, Any]], T]) -> T:
    """What `check` makes of the object that `body` is."""
    if len(body) <= _LARGE:
        return _parsed(body, check_size(body, config), check)
    bodies: Bodies = request.app.state.bodies
    async with bodies.turn(request.scope["state"]["client"].name):
        members = await asyncio.to_thread(check_size, body, config)
        return await asyncio.to_thread(_parsed, body, members, check)


def _parsed(body: bytes, members: int, check: Callable[[dict[str, Any]], T]) -> T:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    if _count(data) < members:
        raise _repeated(body)
    return check(data)


def _count(value: Any) -> int:
    """Its lists, objects, names and strings: fewer than `json_size` counts in a text where a name is repeated, of which
    the parser keeps the last."""
    if isinstance(value, str):
        return 1
    if isinstance(value, list):
        return 1 + sum(_count(each) for each in value if not isinstance(each, int))  # of which there may be very many
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(_count, value.values()))
    return 0


def _repeated(body: bytes) -> ApiError:
    """Which name it is; read by a slower parser, as nobody means it."""
    found: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        found.extend(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)

    json.loads(body, object_pairs_hook=note)
    name = found[0][:200]
    return ApiError(400, f"{name!r} stands more than once in one object", param=name, code="invalid_json")


def check_size(body: bytes, config: ServeConfig) -> int:
    """Refuse what lies too deep in each other, and more than any request has: parsed, it is many times its size, and
    each member could be an error. Returns the number of members: lists, objects, names and strings."""
    depth, members, elements = json_size(body)
    if depth > config.max_json_depth:
        message = f"lists and objects lie in each other {config.max_json_depth} deep at most"
        raise ApiError(400, message, code="too_deep")
    if members > _MEMBERS:
        message = f"a request has {_MEMBERS:,} lists, objects, names and strings at most"
        raise ApiError(400, message, code="too_many_members")
    most = config.max_body_bytes // _BYTES_PER_ELEMENT
    if elements > most:
        raise ApiError(400, f"the lists of a request have {most:,} elements at most", code="too_many_members")
    return members


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
    first = _told(error.errors(include_url=False))
    path = _path(first["loc"], kind)
    unknown, not_there, tag = first["type"] == _UNKNOWN, first["type"] == NOT_THERE, first["type"].startswith(_TAG)
    if unknown or not_there or tag:
        path.append(first["ctx"]["name" if unknown else "place" if not_there else "discriminator"].strip("'"))
    param = (where + ".".join(str(part) for part in path))[:200]
    if unknown:
        known = f"; {near(param[:100], kind.names())}" if not first["loc"] else ""
        return ApiError(400, f"there is no field {param[:200]!r}{known}", param=param, code="unknown_parameter")
    if not_there:
        return ApiError(400, f"{param}: {first['msg']}", param=param, code="unsupported_parameter")
    if first["type"] in ("missing", f"{_TAG}not_found"):
        return ApiError(400, f"{param} is missing", param=param, code="missing_parameter")
    message = re.sub("^Input should be ", "allowed is ", first["msg"].removeprefix("Value error, "))
    message = f"allowed is {first['ctx']['expected_tags']}" if tag else message
    message = re.sub("(?<= )(True|False|None)$", lambda found: _AS_JSON[found[1]], message)
    if first["type"] in _PLAINER:
        message = "allowed is " + _PLAINER[first["type"]].format(**first.get("ctx", {}))
    return ApiError(400, f"{param}: {message}{_got(first)}", param=param, code="invalid_value")


def _got(error: Any) -> str:
    """The value at fault, or how long it is where that is the fault; what is neither short nor a scalar is not told."""
    given = error["input"]
    if error["type"].endswith(("too_short", "too_long")):
        return f"; got {len(given)}"
    if isinstance(given, str):
        return f"; got {json.dumps(given[:40])}" + "…" * (len(given) > 40)
    return f"; got {json.dumps(given)[:54]}" if isinstance(given, int | float) else ""


def _told(errors: list[Any]) -> Any:
    """Of all errors about the first field at fault, the one to tell. Of a union all members complain: told is the one
    whose type the value has, or else the one that got furthest."""
    field = errors[0]["loc"][:1]

    def order(error: Any) -> tuple[bool, int, int]:
        places = [part for part in error["loc"] if isinstance(part, int)]
        other_type = error["type"].endswith("_type") or (
            error["type"] == "literal_error" and not isinstance(error["input"], str)
        )
        return not other_type, len(error["loc"]), places[-1] if places else 0

    return max((error for error in errors if error["loc"][:1] == field), key=order)


def _path(loc: tuple[int | str, ...], kind: type[Body]) -> list[int | str]:
    """Where in the request an error is: pydantic's path without the names it has for members of unions."""
    path: list[int | str] = []
    types, tag = _members(kind)
    for part in loc:
        if tag is not None:  # this part says which of the types it is
            types = [each for each in types if part in get_args(each.model_fields[tag].annotation)]
            tag = None
        elif inside := [found for each in types for found in _inside(each, part)]:
            members = [_members(*each) for each in inside]
            types = [each for some, _ in members for each in some]
            tag = next((tag for _, tag in members if tag), None)
            path.append(part)
    return path


def _inside(kind: Any, part: int | str) -> list[tuple[Any, Any]]:
    """The type of what has this name or number in a value of a type, and the discriminator; empty where nothing has."""
    if isinstance(part, int):
        return [(get_args(kind)[0], None)] if get_origin(kind) is list else []
    if get_origin(kind) is dict:
        return [(get_args(kind)[1], None)]
    fields = kind.model_fields.items() if isinstance(kind, type) and issubclass(kind, Body) else ()
    return [(field.annotation, field.discriminator) for name, field in fields if part == (field.alias or name)]


def _members(kind: Any, tag: Any = None) -> tuple[list[Any], Any]:
    """What a value of a type may be, and the field that says which of several models it is, where one does."""
    if get_origin(kind) is Annotated:
        kind, *notes = get_args(kind)
        return _members(kind, next((tag for note in notes if (tag := getattr(note, "discriminator", None))), tag))
    if get_origin(kind) not in (Union, UnionType):
        return [kind], tag
    members = [_members(each) for each in get_args(kind) if each is not type(None)]
    return [each for some, _ in members for each in some], next((tag for _, tag in members if tag), tag)
