"""`herd serve` in a process of its own, as its users start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping

import httpx2 as httpx


def until(condition: Callable[[], object], seconds: float = 180.0) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


class Program:
    """The process, once it listens; it may not be ready then. `errors` has the lines of its standard error so far."""

    def __init__(self, *arguments: object, environment: Mapping[str, str] = os.environ, key: str = "none") -> None:
        command = [sys.executable, "-m", "herd", "serve", *map(str, arguments), "--port", "0", "--json"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(environment)
        )
        self.errors: list[str] = []
        assert self.process.stdout is not None and self.process.stderr is not None
        stderr = self.process.stderr
        threading.Thread(target=lambda: self.errors.extend(stderr), daemon=True).start()
        lines = ""
        while not lines.endswith("}\n"):
            lines += (line := self.process.stdout.readline())
            assert line, self.errors
        self.url: str = json.loads(lines)["url"]
        self.client = httpx.Client(base_url=self.url, timeout=120, headers={"authorization": f"Bearer {key}"})

    def close(self) -> None:
        """End it; it may have ended already."""
        self.client.close()
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
