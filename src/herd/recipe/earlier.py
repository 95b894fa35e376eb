"""What a recipe takes from earlier work: checkpoints and vocabularies of other runs, or from elsewhere.

A checkpoint is named as everywhere (`herd.checkpoint.continuing`): a path, a run directory, a pulled repository. Other
recipes' runs are named runs/NAME, as `herd run` calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from herd.checkpoint import continuing
from herd.errors import HerdError, UsageError
from herd.recipe.hashing import fingerprint_paths
from herd.recipe.shrink import RUN, SHRUNK


def earlier(name: str) -> Path:
    """The checkpoint directory, or the file, that `name` means. Raises UsageError that says how to make or get it."""
    if Path(name).is_file():
        return Path(name)
    try:
        return continuing(name)
    except HerdError as error:
        if not RUN.fullmatch(name) or Path(name).exists():
            raise UsageError(error.what, value=error.value, allowed=error.allowed, fix=error.fix) from None
        recipe, shrunk = name.removeprefix("runs/"), ""
        if recipe.endswith(SHRUNK):
            recipe, shrunk = recipe.removesuffix(SHRUNK), " --shrink"
        raise UsageError(
            "there is no such run yet",
            value=name,
            allowed="a run directory, a checkpoint, a pulled OWNER/NAME",
            fix=f"herd run {recipe}{shrunk} makes it",
        ) from None


def absent(look_up: Callable[[str], object], names: Iterable[str | None]) -> list[UsageError]:
    """What `look_up` says of the names that it does not find."""
    found = []
    for name in names:
        try:
            if name is not None:
                look_up(name)
        except UsageError as error:
            found.append(error)
    return found


def fingerprint(names: Iterable[str | None]) -> list[dict[str, Any]] | None:
    """What lies behind the names now; None where there is none."""
    found = [earlier(name) for name in names if name is not None]
    return fingerprint_paths(found) if found else None
