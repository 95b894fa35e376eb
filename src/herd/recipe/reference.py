"""What a recipe can say: every field of every stage with its type, default, bounds and meaning.

`herd fields` prints it and `make docs` writes docs/fields.md with it, out of the classes that check a recipe.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from herd.recipe.stage import Stage

_NAMES = {int: "integer", float: "number", bool: "true, false", str: "text"}
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "at least", "max_length": "at most"}
"""Attributes of the rules that pydantic keeps with a field."""


@dataclass(frozen=True)
class FieldReference:
    """One field: `path` is what stands before `=` in `herd run`; `default` is YAML, empty where there is none."""

    path: str
    allowed: str
    default: str
    description: str


def reference(stages: Iterable[Stage]) -> list[FieldReference]:
    """Every field of the stages, nested ones included, in the order of the config classes."""
    return [field for stage in stages for field in _fields(stage.config, stage.name, stage.config.model_construct())]


def to_markdown(fields: Iterable[FieldReference], stages: Iterable[Stage]) -> str:
    """The reference page of the docs: a table for each stage."""
    rows = list(fields)
    top = "Made by `make docs`; `herd fields` prints the same. Beside its stages a recipe has a `name`, a `seed` and a"
    parts = [f"# Every field of a recipe\n\n{top}\n`description`.\n"]
    for stage in stages:
        own = [row for row in rows if row.path.startswith(stage.name + ".")]
        lines = ["", f"## {stage.name}", "", "| field | allowed | default | meaning |", "|---|---|---|---|"]
        for row in own:
            cells = (f"`{row.path}`", row.allowed, f"`{row.default}`" if row.default else "", row.description)
            lines.append("| " + " | ".join(re.sub(r"([|*])", r"\\\1", cell) for cell in cells) + " |")
        parts += ["\n".join(lines) + "\n"] if own else []
    return "".join(parts)


def _fields(config: type[BaseModel], path: str, defaults: BaseModel) -> Iterator[FieldReference]:
    for name, info in config.model_fields.items():
        default = getattr(defaults, name, None)
        inner = _model(info.annotation)
        if inner is not None and isinstance(default, BaseModel):
            yield from _fields(inner, f"{path}.{name}", default)
            continue
        optional = next(filter(None, map(_model, typing.get_args(info.annotation))), None) if default is None else None
        if optional is not None:
            yield FieldReference(f"{path}.{name}", "fields, or null", "null", info.description or "")
            yield from _fields(optional, f"{path}.{name}", optional.model_construct())
            continue
        own_seed = name == "seed" and "." not in path  # filled in by the recipe
        shown = "" if info.is_required() or own_seed else _yaml(default)
        meaning = (
            f"{(info.description or '').rstrip('.')}; the recipe's unless given" if own_seed else info.description or ""
        )
        yield FieldReference(f"{path}.{name}", _allowed(info), shown, meaning)


def _model(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _allowed(info: FieldInfo) -> str:
    """The type in words, with the bounds that pydantic checks."""
    bounds = []
    for rule in info.metadata:
        bounds += [f"{sign} {_yaml(getattr(rule, name))}" for name, sign in _SIGNS.items() if hasattr(rule, name)]
    kind = _type(info.annotation)
    return f"{kind}{', ' if kind.startswith('list') and bounds else ' '}{', '.join(bounds)}".strip()


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(_yaml(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        rest = " or ".join(_type(one) for one in arguments if one is not types.NoneType)
        return f"{rest} or null" if types.NoneType in arguments else rest
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"{_type(arguments[0])} → {_type(arguments[1])}"
    if origin is typing.Annotated:
        return _type(arguments[0])
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return json.dumps(value) if isinstance(value, str) and ": " in value else str(value)
