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
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from herd.engine import LLM, Chunk, Sampling
from herd.engine.backend import CacheFull
from herd.engine.prompts import check_ids
from herd.engine.scheduler import PREFILL_TOKENS
from herd.errors import ContextLengthExceeded
from herd.serve.errors import ApiError
from herd.serve.keys import Client
from herd.serve.pace import Pace
from herd.serve.piecework import Pieces, Piecework
from herd.serve.queue import FairQueue, Job
from herd.serve.ticket import Ticket, hand_out, queue_full, too_late, too_slow
from herd.serve.turns import Turns

J = TypeVar("J", bound=Job)
T = TypeVar("T")
log = logging.getLogger("herd.serve")

# Prompts enter in pieces that take about so long: answers beside them wait for each, and who gives up does too.
_STEP_SECONDS = 0.25
_PIECES = (64, PREFILL_TOKENS)  # fewer tokens are slower one by one
_FIRST_PIECE = 256  # when nothing is known of the speed
_COMPILING = 4  # requests whose grammars are compiled at a time, in the batch: others wait for that in the queue


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
        share_beginnings: bool = False,
        name: str = "model",
        on_gaps: Callable[[list[float]], None] = lambda seconds: None,
    ) -> None:
        """`on_gaps` is told on the thread, after a step, how long after the one before it each token came."""
        self.llm = llm
        self._max_queue = max_queue
        self._max_running = max_running
        self._max_wait = max_wait
        self._deadline = deadline
        self._share_beginnings = share_beginnings
        self._on_gaps = on_gaps
        self._state = threading.Condition()  # guards all that follows
        self._queue: FairQueue[Ticket] = FairQueue()
        self._running: list[Ticket] = []
        self._cancelled: list[Ticket] = []
        self._works: FairQueue[Piecework[Any]] = FairQueue()  # beside the batch, as many as may wait for it
        self._working: Piecework[Any] | None = None  # the one of them whose text is being done
        self._stopping: BaseException | None = None
        self._queued_cost = 0
        self._pace, self._works_pace = Pace(), Pace()
        self._turns = Turns()
        self._prompt_speed = _FIRST_PIECE / _STEP_SECONDS
        llm.scheduler.most_running = max_running
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
        late: Callable[[], ApiError] = too_late,
    ) -> Ticket:
        """Queue a request. Raises UsageError, ContextLengthExceeded, and ApiError when too many wait already.

        A grammar has been tried with `LLM.max_tokens`: that may take a second, and nobody's event loop has one.
        """
        with self._state:
            if self._stopping is not None:
                raise self._stopping
        if len(prompt) >= self.llm.context:
            raise ContextLengthExceeded(len(prompt) + 1, self.llm.context, self.llm.config.context_length)
        ids = check_ids(prompt, self.llm.config.vocab_size)
        max_tokens = self.llm.max_tokens(ids, replace(sampling, grammar=None))
        ticket = Ticket(
            prompt=ids,
            sampling=sampling,
            n=n,
            client=client,
            continues_text=continues_text,
            cost=len(ids) + n * max_tokens,
            deadline=time.monotonic() + min(self._deadline, deadline or self._deadline),
            late=late,
            loop=asyncio.get_running_loop(),
        )
        with self._state:
            if self._stopping is not None:
                raise self._stopping
            full = self._full()
            crowd_out = self._put(self._queue, ticket, full)
            if crowd_out is not None:
                self._queued_cost -= crowd_out.cost
                crowd_out.over = True
            self._queued_cost += ticket.cost
            self._state.notify()
        if crowd_out is not None:
            crowd_out.events.put_nowait(full)
        return ticket

    def _put(self, queue: FairQueue[J], job: J, full: ApiError) -> J | None:
        """Let a job wait. Returns the one that gives way to it in a full queue; raises `full` where none does."""
        crowd_out = self._check_full(queue, job.owner, full)
        if crowd_out is not None:
            queue.remove(crowd_out)
        queue.put(job)
        return crowd_out

    def _check_full(self, queue: FairQueue[J], owner: str, full: ApiError) -> J | None:
        """The job that would give way to one of this owner, if the queue is full; raises `full` where none does."""
        busy = self._working is not None if queue is self._works else bool(self._running)
        if len(queue) < self._max_queue or not (queue or busy):
            return None
        crowd_out = queue.last_of_the_longest(owner)
        if crowd_out is None:
            raise full
        return crowd_out

    def check_wait(self, client: Client, *, beside: bool = False) -> None:
        """Raises ApiError when a request of this client, or work beside the batch, has no room in the queue now, or
        would wait there longer than one may.

        That costs nothing. So a server that is asked for three times what it can do goes on doing what it can, in time.
        """
        with self._state:
            if beside:
                self._check_full(self._works, client.name, self._works_full())
                wait = self._works_pace.seconds(self._works.ahead_of(client.name))
            else:
                self._check_full(self._queue, client.name, self._full())
                wait = self._pace.seconds(self._queue.ahead_of(client.name) + self._until_a_place(client))
        if self._max_wait is not None and wait > self._max_wait:
            raise too_slow(wait - self._max_wait)

    def _full(self) -> ApiError:
        return queue_full(self._pace.seconds(self._queued_cost))

    def _works_full(self) -> ApiError:
        return queue_full(self._works_pace.seconds(sum(work.cost for work in self._works.jobs())))

    def _until_a_place(self, client: Client) -> float:
        """What the batch will do, in the unit of cost, until one of its requests has ended; 0 where a place is free."""
        batch = self.llm.scheduler
        if not self._running or (batch.waiting == 0 and batch.running < self._places(client)):
            return 0.0
        return len(self._running) * min(ticket.cost * (1 - ticket.credited) for ticket in self._running)

    def _places(self, client: Client) -> int:
        """How many answers may be in the batch when one of this client enters it.

        Where there are several keys, some places are kept for those that have no answer in it: long answers of one key
        else let another one wait for as long as they take, however fair the queue is.
        """
        if client.shares and any(ticket.client is client for ticket in self._running):
            return self._max_running - min(self._max_running - 1, max(1, self._max_running // 4))
        return self._max_running

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

    async def between_steps(
        self,
        begin: Callable[[list[int]], Pieces[T]],
        texts: Sequence[list[int]],
        client: Client,
        on_end: Callable[[int], None] = lambda tokens: None,
    ) -> list[T]:
        """What work on texts gives that uses the model in another way than the batch: a piece of it before each step.

        Texts are done one after the other, so that no two of them wait for each other's room in the cache; whose is
        next is as fair between keys as the queue. `on_end` gets the tokens that were computed, however it ends. Raises
        ApiError as `submit` does, and when all of it takes too long.
        """
        work = Piecework(begin, texts, client)
        with self._state:
            if self._stopping is not None:
                raise self._stopping
            full = self._works_full()
            crowd_out = self._put(self._works, work, full)
            self._state.notify()
        if crowd_out is not None:
            crowd_out.give_up(full)
        try:
            async with asyncio.timeout(self._deadline):
                return await work.result
        except TimeoutError:
            raise too_late() from None
        finally:
            with self._state:
                self._works.remove(work)
            on_end(work.tokens)

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
            return not (self._queue or self._running or self._works or self._working)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, why: BaseException) -> None:
        """End all requests with `why`, and the thread; returns when it has ended."""
        with self._state:
            self._stopping = why
            self._state.notify()
        self._thread.join()

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
        start = time.perf_counter()
        worked = self._work()
        self._admit()
        stepped = bool(self._running)
        if stepped:
            self._step()
        seconds = time.perf_counter() - start
        with self._state:  # each is as fast as the other lets it be
            if worked:
                self._works_pace.worked(seconds)
            if stepped:
                self._pace.worked(seconds)
        return True

    def _has_work(self) -> bool:
        waits = self._queue or self._works or self._cancelled
        return bool(waits or self._running or self._working or self._stopping)

    def _work(self) -> bool:
        """A piece of the work beside the batch, as long as a piece of a prompt; False where there is none."""
        with self._state:
            work = self._working = self._working or self._works.pop()
        if work is None:
            return False
        tokens, start = self._piece, time.perf_counter()
        goes_on = self._advance(work, tokens)
        if goes_on is None:
            return True  # it does nothing, and its time passes
        seconds = time.perf_counter() - start
        self._turns.worked(seconds, self.llm.scheduler.short_of_room)
        if goes_on:
            self._learn(tokens, seconds)
            with self._state:
                self._works_pace.went_on(work)
            return True
        with self._state:
            self._working = None
            if work.computed == work.cost:
                self._works_pace.finished(work)
            if work.next_text():
                self._works.put(work)
        return True

    def _advance(self, work: Piecework[Any], tokens: int) -> bool | None:
        """Do a piece of work beside the batch, for which answers may have to give way; None where it is their turn."""
        if work.next_is_new and not self._turns.of_texts:
            return None
        try:
            return work.advance(tokens)
        except CacheFull:
            self.llm.scheduler.make_way()
        try:
            return work.advance(tokens)
        except CacheFull as error:  # it is larger than all there is
            work.give_up(error)
            return False

    def _admit(self) -> None:
        """Requests whose turn it is enter the batch, as long as all that is in it has room.

        Those with a grammar wait in the queue while enough grammars are being compiled; others go past them.
        """
        batch = self.llm.scheduler
        while batch.waiting == 0 and batch.running < self._max_running:
            with self._state:
                ticket = self._queue.pop(self._may_enter, self._fits)
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
                    salt=self._salt(ticket.client),
                )
            except Exception as error:  # an adapter that was unloaded meanwhile, say
                self._leave(ticket, error)
                continue
            batch.admit()

    def _may_enter(self, ticket: Ticket) -> bool:
        """Else others go past it."""
        batch = self.llm.scheduler
        may_compile = batch.preparing < _COMPILING and len(self._running) < self._max_running
        if ticket.sampling.grammar is not None and not may_compile:
            return False
        places = self._places(ticket.client)
        return places == self._max_running or batch.size + ticket.n <= places

    def _fits(self, ticket: Ticket) -> bool:
        """All its answers find a place, or as many as there are."""
        return ticket.n <= self._max_running - self.llm.scheduler.running or self.llm.scheduler.running == 0

    def _salt(self, client: Client) -> str:
        """What tells its prompts from other keys': else how soon an answer begins tells one key what another asked."""
        return client.owner if client.shares and not self._share_beginnings else ""

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
        self._turns.stepped(seconds)
        events, self._events = self._events, []
        if events:
            self._on_gaps(_gaps(events))
            # One call a step: the loop is woken once, however many answers go on.
            events[0][0].loop.call_soon_threadsafe(hand_out, events)
        with self._state:
            for ticket in self._running:
                self._pace.went_on(ticket)
        for ticket in list(self._running):
            error = next((s.error for s in ticket.sequences if s.error is not None), None)
            if error is None:
                if any(s.completion is None for s in ticket.sequences):
                    continue
                with self._state:
                    self._pace.finished(ticket)
            self._leave(ticket, error)

    def _learn(self, tokens: int, seconds: float) -> None:
        """What a step took says how much of the prompts to take in the next one."""
        speed = tokens / max(seconds, 1e-6)
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
            tired_works = [work for work in self._works.jobs() if not work.begun and now - work.arrived > patience]
            for work in tired_works:
                self._works.remove(work)
        for ticket in late:
            self._leave(ticket, ticket.late())
        for ticket in tired:
            self._leave(ticket, too_slow(1.0))
        for work in tired_works:
            work.give_up(too_slow(1.0))

    def _end_all(self, why: BaseException) -> None:
        with self._state:
            tickets = [*self._queue.jobs(), *self._running]
            for ticket in tickets:
                self._queue.remove(ticket)
            works = self._works.jobs()
            for work in works:
                self._works.remove(work)
            if self._working is not None:
                works.append(self._working)
                self._working = None
        for work in works:
            work.give_up(why)
        for ticket in tickets:
            self._leave(ticket, why)


def _gaps(events: list[tuple[Ticket, int, Chunk]]) -> list[float]:
    """Seconds from each answer's token to these, which have come now; none of an answer's first one."""
    now, found = time.perf_counter(), []
    for ticket, j, _ in events:
        if j in ticket.latest:
            found.append(now - ticket.latest[j])
        ticket.latest[j] = now
    return found
