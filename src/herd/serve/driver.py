"""A thread that runs one model for everybody: requests come from the event loop, tokens go back to it.

Requests wait in a queue that is fair between keys, and enter the engine's batch one at a time, as soon as nobody in it
waits for room. So the engine never holds more than one request that is not running, and whose turn is next is decided
as late as possible. Who leaves, waits too long, or is told to stop is gone before the next step.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from herd.engine import LLM, Chunk, Sampling
from herd.engine.prompts import check_ids
from herd.engine.scheduler import PREFILL_TOKENS, LiveSequence
from herd.errors import ContextLengthExceeded
from herd.serve.errors import ApiError
from herd.serve.keys import Client
from herd.serve.pace import Pace
from herd.serve.piecework import Pieces, Piecework
from herd.serve.queue import FairQueue

T = TypeVar("T")
log = logging.getLogger("herd.serve")

# Prompts enter in pieces that take about so long: answers beside them wait for each, and who gives up does too.
_STEP_SECONDS = 0.25
_PIECES = (64, PREFILL_TOKENS)  # fewer tokens are slower one by one
_FIRST_PIECE = 256  # when nothing is known of the speed


@dataclass(eq=False)
class Ticket:
    """One request: n answers to a prompt. Tokens are read from it as from an iterator of (answer's number, chunk)."""

    prompt: list[int]
    sampling: Sampling
    n: int
    client: Client
    continues_text: bool
    cost: int
    """Tokens of prompt and answers, at most."""
    deadline: float
    """By time.monotonic()."""
    loop: asyncio.AbstractEventLoop
    arrived: float = field(default_factory=time.monotonic)
    events: asyncio.Queue[tuple[int, Chunk] | BaseException] = field(default_factory=asyncio.Queue)
    sequences: list[LiveSequence] = field(default_factory=list)
    """In the engine's batch; empty while the request waits."""
    over: bool = False
    """Nothing more comes."""

    @property
    def tokens(self) -> int:
        """Of the prompt and of what has been generated so far; none while it waits."""
        return len(self.prompt) + sum(len(s.choices) for s in self.sequences) if self.sequences else 0

    @property
    def owner(self) -> str:
        return self.client.name

    @property
    def weight(self) -> float:
        return self.client.limits.weight

    async def __aiter__(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Chunks until each answer has had its last one. Raises what ended the request before that."""
        left = self.n
        while left:
            event = await self.events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            left -= event[1].finish_reason is not None


class Driver:
    """See above. `max_queue` requests may wait, for `max_wait` seconds; `max_running` answers go on together."""

    def __init__(
        self,
        llm: LLM,
        *,
        max_queue: int,
        max_running: int,
        deadline: float,
        max_wait: float | None = None,
        name: str = "model",
    ) -> None:
        self.llm = llm
        self._max_queue = max_queue
        self._max_running = max_running
        self._max_wait = max_wait
        self._deadline = deadline
        self._state = threading.Condition()  # guards all that follows
        self._queue: FairQueue[Ticket] = FairQueue()
        self._running: list[Ticket] = []
        self._cancelled: list[Ticket] = []
        self._works: deque[Piecework[Any]] = deque()  # beside the batch; the first one has begun
        self._stopping: BaseException | None = None
        self._queued_cost = 0
        self._pace = Pace()
        self._prompt_speed = _FIRST_PIECE / _STEP_SECONDS
        llm.scheduler.prefill_tokens = self._piece
        self._events: list[tuple[Ticket, int, Chunk]] = []  # of the step that runs
        self._thread = threading.Thread(target=self._run, name=f"herd-{name}", daemon=True)
        self._thread.start()

    # --- called on the event loop ---------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        client: Client,
        *,
        n: int = 1,
        continues_text: bool = True,
        deadline: float | None = None,
    ) -> Ticket:
        """Queue a request. Raises UsageError, ContextLengthExceeded, and ApiError when too many wait already."""
        with self._state:
            if self._stopping is not None:
                raise self._stopping
        if len(prompt) >= self.llm.context:
            raise ContextLengthExceeded(len(prompt) + 1, self.llm.context, self.llm.config.context_length)
        ids = check_ids(prompt, self.llm.config.vocab_size)
        max_tokens = self.llm.max_tokens(ids, sampling)
        ticket = Ticket(
            prompt=ids,
            sampling=sampling,
            n=n,
            client=client,
            continues_text=continues_text,
            cost=len(ids) + n * max_tokens,
            deadline=time.monotonic() + min(self._deadline, deadline or self._deadline),
            loop=asyncio.get_running_loop(),
        )
        with self._state:
            if self._stopping is not None:
                raise self._stopping
            crowd_out = None
            if len(self._queue) >= self._max_queue and (self._queue or self._running):
                crowd_out = self._queue.last_of_the_longest(than=ticket)
                if crowd_out is None:
                    raise self._full()
                self._queue.remove(crowd_out)
                self._queued_cost -= crowd_out.cost
                crowd_out.over = True
            self._queue.put(ticket)
            self._queued_cost += ticket.cost
            self._state.notify()
        if crowd_out is not None:
            crowd_out.events.put_nowait(self._full())
        return ticket

    def check_wait(self, client: Client) -> None:
        """Raises ApiError when a request of this client would wait longer than one may.

        That costs nothing. So a server that is asked for three times what it can do goes on doing what it can, in time.
        """
        if self._max_wait is None:
            return
        with self._state:
            wait = self._pace.seconds(self._queue.ahead_of(client.name))
        if wait > self._max_wait:
            raise _too_slow(wait - self._max_wait)

    def cancel(self, ticket: Ticket) -> None:
        """Give up a request, wherever it is; nothing when it is over. One that runs ends before the next step."""
        with self._state:
            if ticket.over:
                return
            ticket.over = True
            if self._queue.remove(ticket):
                self._queued_cost -= ticket.cost
            else:
                self._cancelled.append(ticket)
                self._state.notify()

    async def between_steps(self, begin: Callable[[], Pieces[T]]) -> T:
        """The result of work that uses the model in another way than the batch: a piece of it before each step.

        Works are done one after the other, so that no two of them wait for each other's room in the cache.
        """
        work = Piecework(begin)
        with self._state:
            if self._stopping is not None:
                raise self._stopping
            if len(self._works) >= max(1, self._max_queue):
                raise self._full()
            self._works.append(work)
            self._state.notify()
        try:
            async with asyncio.timeout(self._deadline):
                return await work.result
        except TimeoutError:
            raise too_late() from None

    @property
    def waiting(self) -> int:
        """Requests that have no place yet."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests whose answers are generated."""
        return len(self._running)

    @property
    def idle(self) -> bool:
        with self._state:
            return not (self._queue or self._running or self._works)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, why: BaseException) -> None:
        """End all requests with `why`, and the thread; returns when it has ended."""
        with self._state:
            self._stopping = why
            self._state.notify()
        self._thread.join()

    def _full(self) -> ApiError:
        wait = self._wait_estimate()
        return ApiError(429, "too many requests wait already", code="queue_full", retry_after=wait)

    def _wait_estimate(self) -> float:
        """Seconds until what waits now has been done, at the speed of late."""
        return min(60.0, max(1.0, self._pace.seconds(self._queued_cost)))

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException:
            log.exception("the model has stopped")
            with self._state:
                self._stopping = ApiError(503, "the model has stopped", code="stopped")
            self._end_all(self._stopping)

    def _turn(self) -> bool:
        """What is to be done between two steps, and a step; False at the end."""
        with self._state:
            while not self._has_work():
                self._state.wait()
            why = self._stopping
            if why is None:
                cancelled, self._cancelled = self._cancelled, []
        if why is not None:
            self._end_all(why)
            return False
        for ticket in cancelled:
            self._leave(ticket)
        self._expire()
        self._work()
        self._admit()
        if self._running:
            self._step()
        return True

    def _has_work(self) -> bool:
        return bool(self._queue or self._running or self._cancelled or self._works or self._stopping)

    def _work(self) -> None:
        """A piece of the work beside the batch, as long as a piece of a prompt."""
        with self._state:
            work = self._works[0] if self._works else None
        if work is None:
            return
        tokens, start = self._piece, time.perf_counter()
        if work.advance(tokens):
            self._learn(tokens, time.perf_counter() - start)
        else:
            with self._state:
                self._works.popleft()

    def _admit(self) -> None:
        """Requests whose turn it is enter the batch, as long as all that is in it has room."""
        batch = self.llm.scheduler
        while batch.waiting == 0 and batch.running < self._max_running:
            with self._state:
                ticket = self._queue.pop()
                if ticket is None:
                    return
                self._queued_cost -= ticket.cost
                self._running.append(ticket)
            try:
                ticket.sequences = self.llm.begin(
                    ticket.prompt,
                    ticket.sampling,
                    n=ticket.n,
                    continues_text=ticket.continues_text,
                    on_chunk=self._collector(ticket),
                )
            except Exception as error:  # an adapter that was unloaded meanwhile, say
                self._leave(ticket, error)
                continue
            batch.admit()

    def _collector(self, ticket: Ticket) -> Callable[[int, Chunk], None]:
        return lambda j, chunk: self._events.append((ticket, j, chunk))

    def _step(self) -> None:
        batch = self.llm.scheduler
        start, tokens = time.perf_counter(), batch.tokens
        try:
            self.llm.step()
        except Exception:
            log.exception("a step failed: %d requests end", len(self._running))
        seconds = time.perf_counter() - start
        self._learn(batch.tokens - tokens, seconds)
        events, self._events = self._events, []
        if events:
            # One call a step: the loop is woken once, however many answers go on.
            events[0][0].loop.call_soon_threadsafe(_hand_out, events)
        for ticket in list(self._running):
            error = next((s.error for s in ticket.sequences if s.error is not None), None)
            if error is not None or all(s.completion is not None for s in ticket.sequences):
                self._leave(ticket, error)

    def _learn(self, tokens: int, seconds: float) -> None:
        """What a step took says how much of the prompts to take in the next one."""
        speed = tokens / max(seconds, 1e-6)
        self._pace.worked(seconds)
        if tokens >= _PIECES[0] // 2:
            self._prompt_speed = (self._prompt_speed + speed) / 2
        self.llm.scheduler.prefill_tokens = self._piece

    @property
    def _piece(self) -> int:
        """Tokens of prompts to compute in one go."""
        low, high = _PIECES
        return max(low, min(high, int(self._prompt_speed * _STEP_SECONDS)))

    def _leave(self, ticket: Ticket, error: BaseException | None = None) -> None:
        """A request is over: its answers end where they are, and `error` is what its reader meets."""
        self.llm.cancel(ticket.sequences)
        for sequence in ticket.sequences:  # they lead back to it: a circle of a hundred thousand tokens' objects
            sequence.on_chunk = None
        with self._state:
            ticket.over = True
            if ticket in self._running:
                self._running.remove(ticket)
                self._pace.finished(ticket.cost)
        if error is not None:
            ticket.loop.call_soon_threadsafe(ticket.events.put_nowait, error)

    def _expire(self) -> None:
        """Requests whose time is up."""
        now = time.monotonic()
        with self._state:
            waiting = self._queue.jobs()
            late = [ticket for ticket in waiting if ticket.deadline < now]
            patience = self._max_wait or math.inf
            tired = [ticket for ticket in waiting if now - ticket.arrived > patience and ticket.deadline >= now]
            for ticket in late + tired:
                self._queue.remove(ticket)
                self._queued_cost -= ticket.cost
            late += [ticket for ticket in self._running if ticket.deadline < now]
        for ticket in late:
            self._leave(ticket, too_late())
        for ticket in tired:
            self._leave(ticket, _too_slow(1.0))

    def _end_all(self, why: BaseException) -> None:
        with self._state:
            tickets = [*self._queue.jobs(), *self._running]
            for ticket in tickets:
                self._queue.remove(ticket)
            works = list(self._works)
            self._works.clear()
        for work in works:
            work.give_up(why)
        for ticket in tickets:
            self._leave(ticket, why)


def too_late() -> ApiError:
    """For what has taken as long as it may."""
    return ApiError(503, "the request took too long", code="deadline_exceeded", retry_after=5)


def _too_slow(retry_after: float) -> ApiError:
    message = "requests wait longer now than this server lets them"
    return ApiError(429, message, code="queue_too_slow", retry_after=min(60.0, retry_after))


def _hand_out(events: list[tuple[Ticket, int, Chunk]]) -> None:
    for ticket, j, chunk in events:
        ticket.events.put_nowait((j, chunk))
