"""Every error a user can meet, in one place.

A message answers four questions: what happened, which value, what is allowed, which command fixes it. The command line
prints the message without a traceback and exits with the class's code: 2 wrong use, 3 bad file or model, 4 resources.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Self

_ABSENT = object()


class HerdError(Exception):
    """Base of all of Herd's errors. `str(error)` is the complete message for a person.

    Parameters: `what` happened; `value` that was met; `allowed` values in words; `fix`, a command or an action.
    """

    exit_code = 3

    def __init__(
        self, what: str, *, value: object = _ABSENT, allowed: str | None = None, fix: str | None = None
    ) -> None:
        self.what = what
        self.value = None if value is _ABSENT else value
        self.allowed = allowed
        self.fix = fix
        parts = [what.rstrip(".")]
        if value is not _ABSENT:
            parts.append(f"got {_shorten(value)}")
        if allowed:
            parts.append(allowed if allowed.endswith("?") else f"allowed: {allowed}")  # "did you mean …?" by itself
        if fix:
            parts.append(f"to fix: {fix}")
        super().__init__("; ".join(parts))

    def inside(self, where: str) -> Self:
        """The same error, with where it happened in front."""
        self.what = f"{where}: {self.what}"
        self.args = (f"{where}: {self}",)
        return self


class UsageError(HerdError):
    """A wrong argument, option or configuration value."""

    exit_code = 2


class FileFormatError(HerdError):
    """A file that is damaged or not what it claims to be; names the file, the field and the byte offset."""

    def __init__(
        self,
        what: str,
        *,
        file: str | Path | None = None,
        field: str | None = None,
        offset: int | None = None,
        value: object = _ABSENT,
        allowed: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.file = None if file is None else str(file)
        self.field = field
        self.offset = offset
        where = [str(file)] if file is not None else []
        if field is not None:
            where.append(f"field {_shorten(field)}")
        if offset is not None:
            where.append(f"at byte {offset}")
        message = f"{', '.join(where)}: {what}" if where else what
        super().__init__(message, value=value, allowed=allowed, fix=fix)


class ResourceError(HerdError):
    """Not enough memory, disk or time for what was asked."""

    exit_code = 4


class OutOfMemory(ResourceError):
    """A model takes more memory than there is for it: `needed` bytes."""

    def __init__(self, what: str, needed: int, *, value: str, fix: str) -> None:
        self.needed = needed
        super().__init__(what, value=value, fix=fix)


class ContextLengthExceeded(HerdError):
    """More tokens than the context holds. Herd never cuts silently. `largest`: the context the model could have."""

    exit_code = 2

    def __init__(self, needed: int, allowed: int, largest: int | None = None) -> None:
        self.needed = needed
        self.allowed_tokens = allowed
        grow = "" if largest is not None and allowed >= largest else ", or load the model with a larger ctx"
        super().__init__(
            f"the request needs {needed} tokens of context, the model has {allowed}",
            fix=f"shorten the prompt or lower max_tokens{grow}",
        )


class MissingDependency(HerdError):
    """A Python package that only some uses need is not installed. `extra`: the extra of Herd's that has it."""

    def __init__(self, package: str, *, extra: str) -> None:
        super().__init__(
            f"this needs the package {package!r} (of the extra [{extra}]), which is not installed",
            fix=f"pip install {package}",
        )


def near(name: str, known: Iterable[str]) -> str:
    """What an error about an unknown name says is allowed: the name that was meant, if one is near, else all."""
    names = list(known)
    found = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {found[0]!r}?" if found else ", ".join(names)


def _shorten(value: object, limit: int = 160) -> str:
    """A value for a message: untrusted text is quoted, so control characters cannot reach a terminal."""
    if isinstance(value, PurePath):
        value = str(value)
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
