"""Threads for what takes long beside the event loop: a few for each kind of work, and of those a share for each key.
Those that load models are others, as the end of the process does not wait for them.

Work of a key that sends much of it waits for that key's own; another key's finds a thread. What nobody waits for any
more is not begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Pool:
    """`share` of the `threads` may work for one key at a time."""

    def __init__(self, name: str, *, threads: int, share: int) -> None:
        self._threads = ThreadPoolExecutor(threads, f"herd-{name}")
        self._share = share
        self._lanes: dict[str, asyncio.Semaphore] = {}  # as many as keys, whose names are known at the start

    async def run(self, key: str, work: Callable[[], T]) -> T:
        """The result of `work`, done in a thread. Called on one event loop only."""
        lane = self._lanes.setdefault(key, asyncio.Semaphore(self._share))
        loop = asyncio.get_running_loop()

        def leave(_: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(lane.release)

        await lane.acquire()
        job = self._threads.submit(work)
        job.add_done_callback(leave)  # not before its end, also where nobody waits for that any more
        return await asyncio.wrap_future(job)

    def do(self, work: Callable[[], T]) -> T:
        """The result of `work`, of nobody in particular, done in a thread. Waits for it, on no event loop."""
        return self._threads.submit(work).result()

    def close(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Daemon:
    """A thread for each work, which nobody can stop: so nothing waits for it when the process ends."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._working = 0

    @property
    def working(self) -> bool:
        """Something is being done."""
        return self._working > 0

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`. Called on one event loop only."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def done(future: Future[T]) -> None:
            self._working -= 1
            if result.cancelled():
                return
            if (error := future.exception()) is None:
                result.set_result(future.result())
            else:
                result.set_exception(error)

        def run() -> None:
            found: Future[T] = Future()
            try:
                found.set_result(work())
            except BaseException as error:
                found.set_exception(error)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(done, found)

        self._working += 1
        threading.Thread(target=run, name=self._name, daemon=True).start()
        return await result


class Pools:
    """Those of one application."""

    def __init__(self) -> None:
        self.texts = Pool("texts", threads=4, share=2)
        self.grammars = Pool("grammars", threads=2, share=1)

    def close(self) -> None:
        self.texts.close()
        self.grammars.close()
