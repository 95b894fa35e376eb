"""Say something a person must not miss: one line on standard error, also off a terminal."""

from __future__ import annotations

import sys

from herd.progress import speaks, status


def announce(text: str) -> None:
    """Print `text` on its own line, clearing the live status line first. Of several ranks, the first one speaks."""
    if not speaks():
        return
    status("")
    print(f"herd: {text}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """The beginning of an error's text: what fits on a line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
