"""A process in which a grammar from outside is compiled first, since llguidance has no bound on all that it may take.

Long chains of rules or references overflow its stack, which ends a process; intersections of some regular expressions
take gigabytes and minutes before its own limits are looked at. That process may take half a second and 2 GiB. What it
compiles, this process compiles after it; what ends it is refused. It starts with the first grammar (0.1 s), is one for
all models, and ends with this process.

Python runs this file by its path as that other process, so it imports the standard library only.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

TRIAL_S = 0.5
"""Seconds of processor time for one grammar."""
WAIT_S = 8.0
"""Seconds by the clock, for a machine that is busy with other work."""
_TRIAL_BYTES = 2 << 30
_STACK_BYTES = 64 << 20  # 64 KiB of grammar need 16 MiB at the most (measured)
_LIMITS = {
    "initial_lexer_fuel": 250_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 500_000,  # 200 optional properties take 70,000 behind a line break
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}

_PRELOADED = ("LD_PRELOAD", "DYLD_INSERT_LIBRARIES")
_READY = b"ready\n"
_starting = threading.Lock()
_turn = threading.Lock()
_jobs: queue.PriorityQueue[tuple[bool, int, Future[Any], Callable[[], Any]]] = queue.PriorityQueue()
_number = itertools.count()


def compiled(tokenizer: Any, source: str) -> Any:
    """llguidance's matcher at the beginning of a grammar, in an error state where it refuses the grammar.

    Every answer has its own, compiled anew (0.4 to 3 ms, half a second at the most): copies would share the states of
    their lexer, so that one that meets a limit would end the others.
    """
    future: Future[Any] = Future()
    _deep(lambda: _settle(future, lambda: _matcher(tokenizer, source)))
    return future.result()


def compiling(tokenizer: Any, source: str, *, later: bool = False) -> Future[Any]:
    """The same by another thread, one after the other, so that what runs meanwhile keeps its processors.

    What is wanted `later` is compiled when nothing else is left.
    """
    future: Future[Any] = Future()
    _deep(_take_turn)  # each such thread does one job, whichever is first then
    _jobs.put((later, next(_number), future, lambda: _matcher(tokenizer, source)))
    return future


def _matcher(tokenizer: Any, source: str) -> Any:
    llguidance = importlib.import_module("llguidance")
    return llguidance.LLMatcher(tokenizer, source, log_level=0, limits=llguidance.LLParserLimits(**_LIMITS))


def _take_turn() -> None:
    with _turn:
        _, _, future, work = _jobs.get()
        _settle(future, work)


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    """Do what a future stands for, unless nobody wants it any more."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _deep(work: Callable[[], None]) -> None:
    """Run something that recurses, on a thread with a stack for it."""
    with _starting:  # the size counts for all threads that start meanwhile
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=work, name="herd-grammar", daemon=True).start()
        finally:
            threading.stack_size(before)


class Trial:
    """The other process. Several threads may call; they take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def error(self, source: str) -> str | None:
        """What llguidance says against a grammar, "" if nothing; None when it came to no end within its bounds."""
        with self._lock:
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
            reply = self._answer(json.dumps(source).encode() + b"\n")
            if reply.endswith(b"\n"):
                return str(json.loads(reply))
            self.end()
            return None

    def end(self) -> None:
        """End the other process; the next grammar starts another one."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():  # a process that was forked has not started it
            process.kill()
            process.communicate()

    def _start(self) -> None:
        self.end()
        package = importlib.util.find_spec("llguidance")
        assert package is not None and package.origin is not None
        command = [sys.executable, "-I", "-S", __file__, str(Path(package.origin).parent.parent)]
        # What is loaded before all else, such as a sanitiser, may want more memory than that process has.
        environment = {name: value for name, value in os.environ.items() if name not in _PRELOADED}
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, env=environment)
        self._owner = os.getpid()
        if self._answer(b"") != _READY:
            from herd.errors import HerdError

            self.end()
            raise HerdError("the process that tries grammars does not start", value=" ".join(command))

    def _answer(self, line: bytes) -> bytes:
        """The line that comes back for a line; without its end when the process ended, by itself or for its time."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        timer = threading.Timer(WAIT_S, process.kill)
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            return process.stdout.readline()
        except OSError:
            return b""
        finally:
            timer.cancel()


trial = Trial()
"""The one of this process."""
atexit.register(trial.end)


def _serve() -> None:
    """The other process: for each grammar that comes as a line of JSON, a line with what is wrong with it."""
    sys.path.append(sys.argv[1])
    with contextlib.suppress(ImportError, ValueError):
        resource = importlib.import_module("resource")
        resource.setrlimit(resource.RLIMIT_AS, (_TRIAL_BYTES, _TRIAL_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    bytes_only = importlib.import_module("llguidance").LLTokenizer("byte")
    sys.stdout.buffer.write(_READY)
    sys.stdout.flush()
    timed = hasattr(signal, "setitimer")
    for line in sys.stdin.buffer:
        if timed:
            signal.setitimer(signal.ITIMER_PROF, TRIAL_S)  # its signal ends the process
        matcher = compiled(bytes_only, json.loads(line))
        matcher.compute_bitmask()
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
        sys.stdout.buffer.write(json.dumps(matcher.get_error()).encode() + b"\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
