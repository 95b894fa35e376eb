"""A request for answers on its way through a model, and why one is given up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from herd.engine import Chunk, Sampling
from herd.engine.live_sequence import LiveSequence
from herd.serve.errors import ApiError
from herd.serve.keys import Client

_TEXT_BYTES = 8  # of a token, in JSON


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
    late: Callable[[], ApiError]
    """What its reader meets when that has passed."""
    loop: asyncio.AbstractEventLoop
    arrived: float = field(default_factory=time.monotonic)
    events: asyncio.Queue[tuple[int, Chunk] | BaseException] = field(default_factory=asyncio.Queue)
    sequences: list[LiveSequence] = field(default_factory=list)
    """In the engine's batch; empty while the request waits."""
    over: bool = False
    """Nothing more comes."""
    latest: dict[int, float] = field(default_factory=dict)
    """When each answer had its last token, by time.perf_counter()."""
    credited: float = 0.0
    """How much of it is done, as the pace of the model counts it."""

    @property
    def tokens(self) -> int:
        """Of the prompt and of what has been generated so far; none while it waits."""
        return len(self.prompt) + sum(len(s.choices) for s in self.sequences) if self.sequences else 0

    @property
    def computed(self) -> int:
        """Of the same, those that were computed for it: not what was remembered of the prompt."""
        if not self.sequences:
            return 0
        first = self.sequences[0]
        of_prompt = min(first.n_computed, len(self.prompt)) - first.n_reused
        return max(0, of_prompt) + sum(len(s.choices) for s in self.sequences)

    @property
    def computable(self) -> int:
        """So many at most."""
        return self.cost - (self.sequences[0].n_reused if self.sequences else 0)

    def json_bytes(self, of_logprob: int) -> int:
        """Of its answers as JSON, at most, about: so many for each log-probability, where they are asked for."""
        answered = self.cost - len(self.prompt)
        shown = answered * self.sampling.wants_logprobs + len(self.prompt) * self.sampling.prompt_logprobs
        return _TEXT_BYTES * answered + of_logprob * shown * (1 + self.sampling.top_logprobs)

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


def hand_out(events: list[tuple[Ticket, int, Chunk]]) -> None:
    for ticket, j, chunk in events:
        ticket.events.put_nowait((j, chunk))


def queue_full(wait: float) -> ApiError:
    """`wait`: seconds until what waits now has been done, at the speed of late."""
    retry_after = min(60.0, max(1.0, wait))
    return ApiError(429, "too many requests wait already", code="queue_full", retry_after=retry_after)


def too_late(timeout: float | None = None) -> ApiError:
    """For what has taken as long as it may: the server's time, or the seconds that it asked for itself.

    The latter is no state of the server: official clients do not try again after a 400.
    """
    if timeout is not None:
        message = f"timeout: the request took more than its {timeout:g} seconds"
        return ApiError(400, message, param="timeout", code="timeout_exceeded")
    return ApiError(503, "the request took too long", code="deadline_exceeded", retry_after=5)


def too_slow(retry_after: float) -> ApiError:
    message = "requests wait longer now than this server lets them"
    return ApiError(429, message, code="queue_too_slow", retry_after=min(60.0, retry_after))
