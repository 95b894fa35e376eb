"""SIGTERM and SIGINT end a run between two steps, with its state saved."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Terminated(SystemExit):
    """The run was told to end (SIGTERM) and has saved its state: the process leaves with exit code 0."""

    def __init__(self) -> None:
        super().__init__(0)


class StopSignals:
    """While the block runs, SIGTERM and the first SIGINT only set `received`; a second SIGINT interrupts at once.

    Handlers can be set in the main thread only; elsewhere the block changes nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        # Not print(): the signal may have come in the middle of another write to the same stream.
        os.write(2, f"\nherd: {self.received.name}: finishing this step and saving the state\n".encode())

    def leave(self) -> None:
        """Raise what the received signal asks for: KeyboardInterrupt (exit code 130) or Terminated (0)."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated
