"""Stage configurations: pydantic models whose errors read like advice."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

from herd.errors import UsageError, near

if typing.TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Config(pydantic.BaseModel):
    """Base of every stage's configuration: immutable, no unknown keys; each field has a description and bounds."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


# What pydantic says in words of its own, in ours.
_PLAINER = {
    "tuple_type": "a list, such as [a, b]",
    "too_short": "{min_length} or more of them",
    "model_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
}

C = TypeVar("C", bound=Config)


def parse_config(cls: type[C], data: Mapping[str, Any], where: str, *, fix: str | None = None) -> C:
    """Build `cls` from plain data. In errors `where` names the source, for example "recipes/pocket.yaml: base", and
    `fix` says what shows the fields."""
    try:
        return cls.model_validate(dict(data))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if first["type"] == "extra_forbidden":
            known = _fields_at(cls, first["loc"][:-1])
            raise UsageError(
                f"{where}: there is no field {path!r}{more}", allowed=near(str(first["loc"][-1]), known), fix=fix
            ) from None
        if first["type"] == "missing":
            raise UsageError(f"{where}: the field {path!r} is not given{more}", fix=fix) from None
        if first["type"] == "value_error" and isinstance(first["input"], Mapping):  # fields that contradict each other
            raise UsageError(f"{where}: {path}{': ' if path else ''}{_allowed(first)}{more}") from None
        what = f"{where}: field {path!r} is not valid{more}"
        raise UsageError(what, value=first["input"], allowed=_allowed(first), fix=fix) from None


def parse_options(cls: type[C], fields: Mapping[str, Any]) -> C:
    """Build `cls` from the options of a command. Errors name them as they are typed: --max-queue for `max_queue`, and
    --allow-host, which may be repeated, for an element of `allow_hosts`."""
    try:
        return cls.model_validate(dict(fields))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field, *element = first["loc"]
        option = str(field).replace("_", "-").removesuffix("s" if element else "")
        raise UsageError(f"--{option} is not valid", value=first["input"], allowed=_allowed(first)) from None


def _allowed(error: ErrorDetails) -> str:
    """What pydantic says is allowed, in plain words."""
    if error["type"] in _PLAINER:
        return _PLAINER[error["type"]].format(**error.get("ctx", {}))
    return error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")


def _fields_at(cls: type[pydantic.BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the model that lies at `path` inside `cls`."""
    for part in path:
        inner = cls.model_fields[str(part)].annotation if str(part) in cls.model_fields else None
        candidates = [inner, *typing.get_args(inner)]
        found = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)]
        if not found:
            return []
        cls = found[0]
    return sorted(cls.model_fields)
