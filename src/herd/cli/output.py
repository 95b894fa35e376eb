"""Where output goes: people read standard error and tables, programs read JSON on standard output."""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.progress import speaks

if TYPE_CHECKING:
    from rich.console import Console

    from herd.errors import HerdError


@functools.cache
def console() -> Console:
    """The console for people: standard error, colours only on a terminal. Of several ranks, the first one speaks."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, quiet=not speaks())


def typed(command: str) -> str:
    """A `herd` command as it can be typed in this shell: by the path of the program where PATH does not lead to it."""
    program, found = Path(sys.argv[0]).absolute(), shutil.which("herd")
    if (
        not command.startswith("herd ")
        or program.name != "herd"
        or not program.exists()
        or (found and program.samefile(found))
    ):
        return command
    near = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    place = str(near) if len(near.parts) > 1 else f"./{near}"
    return f"{shlex.quote(place)} {command.removeprefix('herd ')}"


def told(error: HerdError) -> str:
    """An error's message, whose command can be typed as it stands."""
    return re.sub("(?<=to fix: )herd (?=[a-z-])|(?<=; then )herd (?=[a-z-])", lambda _: typed("herd "), str(error))


def emit(data: Any, as_json: bool, human: Callable[[], None] | None = None) -> None:
    """Print `data` as JSON on standard output, or let `human` print it for a person.

    JSON has no NaN and no infinity: they become null. Of several ranks, the first one prints.
    """
    if not speaks():
        return
    if as_json or human is None:
        json.dump(_finite(data), sys.stdout, indent=2, ensure_ascii=False, default=str, allow_nan=False)
        sys.stdout.write("\n")
    else:
        human()


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def speak(text: str) -> None:
    """Write a model's words to standard output at once. On a terminal its control characters become visible signs:
    what a model says must not move the cursor, rewrite the screen or change the window's title."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def visible(text: str) -> str:
    """The text with a sign in place of every control character but tab and newline."""
    return text.translate(_VISIBLE)


# C0 controls but tab and newline, and DEL, as the pictures Unicode has for them; C1 controls as a replacement sign.
_VISIBLE = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\t\n"} | {127: "\u2421"}
_VISIBLE |= dict.fromkeys(range(128, 160), "\ufffd")


def guesses(right: int, made: int) -> str:
    """What speculation was good for, in words."""
    return f"{right} of {made} guesses right"


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lines of aligned columns, numbers to the right; as wide as it needs to be, so that pipes lose nothing."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    numeric = [all(_is_number(row[i]) for row in cells) and bool(cells) for i in range(len(headings))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(headings), line(["─" * width for width in widths]), *map(line, cells)])


def _is_number(text: str) -> bool:
    return not text or text.strip("+-%~±x×").replace(",", "").replace(".", "").replace(" ", "").isdigit()
