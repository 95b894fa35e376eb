"""A recipe file: YAML and command-line overrides in, a plain `Recipe` out.

    name: pocket
    seed: 0
    stages:
      corpus: {sources: [python-stdlib]}
      tokenizer: {vocab_size: 4096}

A recipe for a family has `sizes`, name → what is otherwise in some stages; `size=NAME` chooses one, the first by
default, and the recipe is then called NAME of the family-NAME of the size:

    name: llama1
    sizes:
      7b: {base: {model: {release: llama1-7b}}}
      65b: {base: {model: {release: llama1-65b}, train: {lr: 1.5e-4}}}

Values of a stage are checked later, by that stage's own config class; this file knows the outer shape only.
"""

from __future__ import annotations

import copy
import difflib
import re
import shlex
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from herd.corpus import STDLIB
from herd.errors import FileFormatError, UsageError, near
from herd.recipe.shrink import shrunk

_PLAIN = ("description", "name", "seed")
_TOP_LEVEL = (*_PLAIN, "sizes", "stages")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Recipe:
    """What a user asked for: stage name → plain values, in the order they run. `source` is named in errors, `options`
    are those of the command line that decided on the content."""

    name: str
    stages: Mapping[str, Mapping[str, Any]]
    seed: int = 0
    description: str = ""
    source: str = "recipe"
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command line that runs this recipe with these overrides."""
        return shlex.join(["herd", "run", self.source, *self.overrides, *self.options])


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, shrink: bool = False, text: str = STDLIB, ranks: int = 1
) -> Recipe:
    """Read a recipe and apply `stage.field=value` overrides, whose values are YAML (`3e-4`, `true`, `[a, b]`).

    `path` is a file, or the name of one in ./recipes, with `-SIZE` behind it maybe. `size=NAME` among the overrides
    chooses one of the recipe's sizes. A stage whose value is `false` is left out. With `shrink` the overrides change
    what `herd.recipe.shrink` made of it, on `text` and for so many `ranks`. Raises UsageError for unknown names and
    FileFormatError for broken YAML.
    """
    file, size = _find(path)
    data = _read_yaml(file)
    if not isinstance(data, dict):
        raise FileFormatError("a recipe is a mapping with the keys name, seed and stages", file=file)
    for key in data:
        if key not in _TOP_LEVEL:
            raise UsageError(f"{file}: there is no key {key!r} at the top", allowed=near(str(key), _TOP_LEVEL))
    data["stages"] = _stage_mapping(data.get("stages"), file)
    if size is not None:
        overrides = (f"size={size}", *overrides)
    chosen = [override.partition("=")[2] for override in overrides if override.startswith("size=")]
    _choose_size(data, file, chosen[-1] if chosen else None)
    options: tuple[str, ...] = ()
    if shrink:
        _checked(data, file, (), ())
        data = shrunk(data, str(file), text=text, ranks=ranks)
        options = ("--shrink", *(() if text == STDLIB else ("--text", text)))
    for override in overrides:
        if not override.startswith("size="):
            _apply(data, override)
    return _checked(data, file, tuple(overrides), options)


def _find(path: str | Path) -> tuple[Path, str | None]:
    """The file a user means, a path or recipes/NAME.yaml, and the size that a name such as llama1-65b has."""
    file = Path(path)
    if file.is_file():
        return file, None
    folder = Path("recipes")
    known = sorted(entry.stem for entry in folder.glob("*.yaml")) if folder.is_dir() else []
    for stem in sorted(known, key=len, reverse=True):
        if str(path) == stem:
            return folder / f"{stem}.yaml", None
        if str(path).startswith(f"{stem}-"):
            return folder / f"{stem}.yaml", str(path).removeprefix(f"{stem}-")
    close = difflib.get_close_matches(file.stem, known, n=3)
    raise UsageError(
        "there is no such recipe file",
        value=str(path),
        allowed=", ".join(f"recipes/{name}.yaml" for name in close or known) or "a path of a .yaml file",
        fix=f"herd run recipes/{(close or known)[0]}.yaml" if known else "go to the folder with recipes/",
    )


def _choose_size(data: dict[str, Any], file: Path, size: str | None) -> None:
    """Put what one of the recipe's sizes has otherwise into its stages, and the size into its name."""
    sizes = data.pop("sizes", None) or {}
    if not isinstance(sizes, dict):
        raise FileFormatError("sizes are a mapping from a name to stages", file=file, field="sizes", value=sizes)
    if not sizes:
        if size is not None:
            raise UsageError(f"{file}: this recipe has one size only", value=size)
        return
    named = {str(name): values for name, values in sizes.items()}
    size = next(iter(named)) if size is None else size
    if size not in named:
        raise UsageError(f"{file}: there is no such size", value=size, allowed=", ".join(named))
    changes = named[size] or {}
    if not isinstance(changes, dict):
        raise FileFormatError("a size is a mapping of stages", file=file, field=f"sizes.{size}", value=changes)
    for stage in changes:
        if stage not in data["stages"]:
            raise UsageError(
                f"{file}: size {size} names a stage that this recipe does not have",
                value=stage,
                allowed=near(str(stage), data["stages"]),
            )
    data["name"] = f"{data.get('name', file.stem)}-{size}"
    data["stages"] = _merged(data["stages"], changes)


def _merged(below: Any, above: Any) -> Any:
    """Mappings one into the other, all the way down; any other value of `above` as it is."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{name: _merged(below.get(name), value) for name, value in above.items()}}


class _Loader(yaml.SafeLoader):
    """Plain data only; a key given twice is an error. As in YAML 1.2, `3e-4` is a number, `on` and `no` are words."""


_BOOL = "tag:yaml.org,2002:bool"


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Hashable] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool) or key in seen:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key!r} appears twice or is not a plain value", problem_mark=key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str) -> Any:
    """Plain data of a YAML text. Raises YAMLError, also where PyYAML itself would let another exception out."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, RecursionError) as error:  # a date such as 2024-99-99; a thousand brackets
        raise yaml.YAMLError(str(error)) from None


def _read_yaml(file: Path) -> Any:
    try:
        return _parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFormatError(f"cannot be read ({error.strerror})", file=file) from None
    except UnicodeDecodeError as error:
        raise FileFormatError("is not UTF-8 text", file=file, offset=error.start) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise FileFormatError(f"is not valid YAML{where}: {error.problem}", file=file) from None
    except yaml.YAMLError as error:
        raise FileFormatError(f"is not valid YAML: {error}", file=file) from None


def _stage_mapping(stages: Any, file: Path) -> dict[str, Any]:
    """`stages` is a mapping name → values, or a list of names and of one-entry mappings."""
    if isinstance(stages, list):
        merged: dict[str, Any] = {}
        for entry in stages:
            pair = {entry: {}} if isinstance(entry, str) else entry
            if not isinstance(pair, dict) or len(pair) != 1 or next(iter(pair)) in merged:
                raise FileFormatError(
                    "a stage in a list is a name, or one name with its values", file=file, field="stages", value=entry
                )
            merged.update(pair)
        stages = merged
    if not isinstance(stages, dict) or not stages:
        raise FileFormatError("a recipe needs at least one stage", file=file, field="stages")
    return {str(name): values for name, values in stages.items()}


def _apply(data: dict[str, Any], override: str) -> None:
    """Change `data` by one `a.b.c=value`."""
    dotted, equals, text = override.partition("=")
    path = dotted.strip().split(".")
    if not equals or not all(path):
        raise UsageError("an override has the form stage.field=value", value=override, fix="base.train.lr=3e-3")
    try:
        value = _parse_yaml(text)
    except yaml.YAMLError:
        raise UsageError(f"the value of {dotted!r} is not valid YAML", value=text, fix=f"{dotted}='...'") from None
    if path[0] in _PLAIN and len(path) == 1:
        data[path[0]] = value
        return
    if path[0] not in data["stages"]:
        raise UsageError(
            "an override names a stage that this recipe does not have",
            value=override,
            allowed=near(path[0], data["stages"]),
        )
    target = data["stages"]
    for depth, key in enumerate(path[:-1]):
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise UsageError(
                f"{'.'.join(path[: depth + 1])!r} is a value, so it has no field {path[depth + 1]!r}", value=target
            )
    target[path[-1]] = value


def _checked(data: dict[str, Any], file: Path, overrides: tuple[str, ...], options: tuple[str, ...]) -> Recipe:
    name, seed, description = data.get("name", file.stem), data.get("seed", 0), data.get("description") or ""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"{file}: name", value=name, allowed="1 to 64 letters, digits and . _ - (it names a folder)")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise UsageError(f"{file}: seed", value=seed, allowed="a whole number from 0 to 2^63 - 1")
    if not isinstance(description, str):
        raise UsageError(f"{file}: description", value=description, allowed="text")
    stages: dict[str, dict[str, Any]] = {}
    for stage, values in data["stages"].items():
        if values is False:
            continue
        if values is not None and not isinstance(values, dict):
            raise UsageError(f"{file}: stage {stage!r}", value=values, allowed="a mapping of its fields, or false")
        stages[stage] = copy.deepcopy(values or {})
    return Recipe(
        name=name,
        stages=stages,
        seed=seed,
        description=description.strip(),
        source=str(file),
        overrides=overrides,
        options=options,
    )
