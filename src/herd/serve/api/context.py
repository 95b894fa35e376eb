"""What the handlers of requests for text have in common: the model, the caller, and who must be told at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response

from herd.engine import Completion, Sampling
from herd.serve.api.body import Body
from herd.serve.config import ServeConfig
from herd.serve.driver import Ticket
from herd.serve.errors import ApiError, bad
from herd.serve.keys import Client
from herd.serve.metrics import Metrics
from herd.serve.registry import Model, Registry
from herd.serve.sse import EventStream, while_connected
from herd.tokenizer import Tokenizer

B = TypeVar("B", bound=Body)
T = TypeVar("T")


class Call:
    """One request for text, from its arrival to its end."""

    def __init__(self, request: Request, model: Model) -> None:
        state = request.app.state
        self.request = request
        self.model = model
        self.config: ServeConfig = state.config
        self.client: Client = request.scope["state"]["client"]
        self.created = int(time.time())
        self._metrics: Metrics = state.metrics
        self._start = time.perf_counter()
        self._tickets: list[Ticket] = []
        self._tokens = 0  # of what has no ticket
        self._inside = False
        self._open = True

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.llm.tokenizer

    def enter(self) -> None:
        """Count the request for its key. Raises ApiError when the key has no more."""
        wait = self.client.wait()
        if wait > 0:
            raise ApiError(429, "this key's limit is reached", code="rate_limit_exceeded", retry_after=wait)
        self.client.enter()
        self._inside = True

    async def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        n: int | None = None,
        continues_text: bool = True,
        timeout: float | None = None,
    ) -> Ticket:
        """Queue answers to a prompt; they are given up when the call is closed."""
        if n is not None and n > self.config.max_n:
            raise bad("n", f"{n} is more than the {self.config.max_n} answers that a request may have")
        if sampling.grammar is not None:  # it is compiled once, which may take a second
            await text_work(lambda: self.model.llm.max_tokens(prompt, sampling))
        ticket = self.model.driver.submit(
            prompt, sampling, self.client, n=n or 1, continues_text=continues_text, deadline=timeout
        )
        self._tickets.append(ticket)
        return ticket

    def done(self, completions: Sequence[Completion], prompt_tokens: int) -> None:
        """Answers are complete, or a prompt that needs none: what they took is counted."""
        if not completions:
            self._tokens += prompt_tokens
        self._metrics.answered(self.model.name, completions, prompt_tokens)

    def close(self) -> None:
        """The request is over, however that came."""
        if not self._open:
            return
        self._open = False
        self.model.users -= 1
        for ticket in self._tickets:
            self.model.driver.cancel(ticket)
        if self._inside:
            # What was computed counts, also where nobody waited for the end of it.
            self.client.leave(self._tokens + sum(ticket.tokens for ticket in self._tickets))
            self._metrics.seconds(self.request.scope["path"], time.perf_counter() - self._start)


async def begin(request: Request, read: Callable[[ServeConfig], Awaitable[B]]) -> tuple[Call, B]:
    """The call that a request is, and its body. The body comes first: without it there is no model."""
    registry: Registry = request.app.state.registry
    body = await read(request.app.state.config)
    model = await registry.get(getattr(body, "model", None))  # which has one user more from here on
    call = request.state.call = Call(request, model)  # closed with the response, or by the application without one
    call.enter()
    return call, body


async def text_work(work: Callable[[], T]) -> T:
    """Run what may take long with long texts beside the event loop."""
    return await asyncio.to_thread(work)


def stream_response(call: Call, events: AsyncGenerator[bytes, None]) -> Response:
    """A response of events that closes the call at its end."""
    return EventStream(events, call.config, call.close)


async def json_response(call: Call, work: Awaitable[dict[str, Any]]) -> Response:
    """A response of one object; the work ends when the client goes."""
    try:
        data = await while_connected(call.request.receive, work)
    finally:
        call.close()
    return Response(orjson.dumps(data), media_type="application/json")
