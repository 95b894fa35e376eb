"""Progress for people: a bar with ETA, or a one-line status, on a terminal's standard error and nowhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def speaks() -> bool:
    """True for the first of several ranks that torchrun started, which share a terminal, and for a single process."""
    return os.environ.get("RANK", "0") == "0"


def interactive() -> bool:
    """True when a person is watching standard error."""
    return sys.stderr.isatty() and speaks()


def track(iterable: Iterable[T], *, total: int | None = None, label: str = "") -> Iterator[T]:
    """Yield from `iterable`, drawing a bar with rate and ETA on a terminal. `total` defaults to len(iterable)."""
    if not interactive():
        yield from iterable
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(iterable, total=total, description=label)


def status(text: str) -> None:
    """Replace the terminal's current line by `text`; an empty text clears it. Nothing happens off a terminal."""
    if interactive():
        sys.stderr.write("\r\x1b[2K" + text)
        sys.stderr.flush()
