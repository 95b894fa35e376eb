"""Stage configurations: pydantic models whose errors read like advice."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

from herd.errors import UsageError


class Config(pydantic.BaseModel):
    """Base of every stage's configuration: immutable, no unknown keys; each field has a description and bounds."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True)


C = TypeVar("C", bound=Config)


def parse_config(cls: type[C], data: Mapping[str, Any], where: str) -> C:
    """Build `cls` from plain data. `where` names the source in errors, for example "recipes/pocket.yaml: base"."""
    try:
        return cls.model_validate(dict(data))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if first["type"] == "extra_forbidden":
            raise UsageError(
                f"{where}: there is no field {path!r}{more}", allowed=_near(str(first["loc"][-1]), cls)
            ) from None
        message = first["msg"][0].lower() + first["msg"][1:]
        raise UsageError(f"{where}: field {path!r} is not valid{more}", value=first["input"], allowed=message) from None


def _near(name: str, cls: type[Config]) -> str:
    known = sorted(cls.model_fields)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else ", ".join(known)
