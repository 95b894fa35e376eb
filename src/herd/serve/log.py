"""The server's log: one line an event, on standard error. No prompt, no answer and no key is ever in it."""

from __future__ import annotations

import logging
import sys


def write_log(level: int = logging.INFO) -> None:
    """Show what the server and uvicorn say."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    for name, least in (("herd.serve", level), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(least)
        logger.handlers[:] = [handler]
        logger.propagate = False
