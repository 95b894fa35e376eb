"""One run directory, one writer: an advisory lock that the system releases when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from herd.errors import ResourceError


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory for the length of the block. Raises ResourceError when another run holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ResourceError(
                f"another run is writing {directory} (process {file.read().strip() or 'unknown'})",
                fix="wait until it ends, or give this run its own directory with --out DIR",
            ) from None
        # The file stays: removing it would let two processes lock two different files of the same name.
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
