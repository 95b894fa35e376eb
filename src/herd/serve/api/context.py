"""What the handlers of requests for text have in common: the model, the caller, and who must be told at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response

from herd.engine import Completion, Grammar, Sampling
from herd.engine.prompts import check_ids
from herd.errors import ContextLengthExceeded, UsageError
from herd.serve.api.body import Body
from herd.serve.api.fields import each_of
from herd.serve.config import ServeConfig
from herd.serve.driver import Ticket
from herd.serve.errors import SHORTEN, ApiError, as_api_error, bad, too_long
from herd.serve.keys import Client
from herd.serve.metrics import Metrics
from herd.serve.parts import PartsResponse
from herd.serve.pools import Pool, Pools
from herd.serve.registry import Model, Registry
from herd.serve.sse import End, EventStream, end_with, while_connected
from herd.tokenizer import Tokenizer

B = TypeVar("B", bound=Body)
T = TypeVar("T")
log = logging.getLogger("herd.serve")

_CHARACTERS_PER_TOKEN = 16  # no text of any language has more than 6


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
        self._pools: Pools = state.pools
        self._start = time.perf_counter()
        self._tickets: list[Ticket] = []
        self._tokens = 0  # of what has no ticket
        self._inside = False
        self._open = True
        self._failure: End | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.llm.tokenizer

    def enter(self, prompts: int = 1, field: str | None = None) -> None:
        """Count the request for its key, as `admit` does."""
        admit(self.client, prompts, field)
        self._inside = True

    @property
    def most_characters(self) -> int:
        """Of a prompt: more cannot fit in the context."""
        return _CHARACTERS_PER_TOKEN * self.model.llm.context

    def check_room(self, characters: int, param: str, *, beside: bool = False) -> None:
        """Refuse a text whose turn would come too late, or that cannot fit, before it is made into tokens.

        That takes seconds where it is a thousand times too long. `beside`: it is for work beside the batch.
        """
        self.model.driver.check_wait(self.client, beside=beside)
        most = self.most_characters
        if characters > most:
            context = self.model.llm.context
            message = (
                f"This model's context is {context} tokens; the request has {characters} characters of {most} at most"
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    async def token_ids(
        self, given: str | list[int] | list[str] | list[list[int]], field: str, *, beside: bool = False
    ) -> list[list[int]]:
        """Ids of each prompt in a field, with BOS in front of texts. Raises ApiError that names the field."""
        llm = self.model.llm
        several: Sequence[str | list[int]] = each_of(given)
        head = [] if llm.tokenizer.bos_id is None else [llm.tokenizer.bos_id]
        self.check_room(max(map(len, several)), field, beside=beside)

        def work() -> list[list[int]]:
            found = []
            for i, each in enumerate(several):
                ids = [*head, *llm.tokenizer.encode(each)] if isinstance(each, str) else each
                where = field if each is given else f"{field}.{i}"
                if not ids:
                    raise bad(where, "there is no token in it")
                try:
                    found.append(check_ids(ids, llm.config.vocab_size))
                except UsageError as error:
                    raise bad(where, str(error)) from None
            return found

        return await self.text_work(work)

    async def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        prompt_in: str,
        advice: str = SHORTEN,
        n: int | None = None,
        continues_text: bool = True,
        timeout: float | None = None,
        grammars: Mapping[str, Grammar],
    ) -> Ticket:
        """Queue answers to a prompt; they are given up when the call is closed.

        `grammars`: those that must be possible, by the fields of the request where they are, with that of `sampling`.
        `prompt_in`: the field that one which is too long came from, with `advice` on that.
        """
        if n is not None and n > self.config.max_n:
            raise bad("n", f"{n} is more than the {self.config.max_n} answers that a request may have")
        try:
            self.model.llm.max_tokens(prompt, replace(sampling, grammar=None))
        except ContextLengthExceeded as error:
            raise too_long(error, prompt_in, advice) from None
        for field, grammar in grammars.items():  # each is compiled once, which may take a second
            try:
                given = replace(sampling, grammar=grammar)
                await self._beside(self._pools.grammars, partial(self.model.llm.max_tokens, prompt, given))
            except UsageError as error:
                raise bad(field, str(error)) from None
        ticket = self.model.driver.submit(
            prompt, sampling, self.client, n=n or 1, continues_text=continues_text, deadline=timeout
        )
        self._tickets.append(ticket)
        return ticket

    async def text_work(self, work: Callable[[], T]) -> T:
        """Run what may take long with long texts beside the event loop. Raises ClientGone when nobody waits for it."""
        return await self._beside(self._pools.texts, work)

    async def _beside(self, pool: Pool, work: Callable[[], T]) -> T:
        return await while_connected(self.request.receive, pool.run(self.client.name, work))

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
        self._tickets.clear()  # a connection keeps its last call, and so would all that was computed for it

    def fail(self, error: Exception) -> ApiError:
        """What the last event of an answer says that ends with this error."""
        told = as_api_error(error)
        if told.code == "internal_error":
            log.error("an answer failed", exc_info=error)
        self._failure = end_with(told)
        return told

    def close_stream(self, status: int, end: End | None) -> None:
        """`close`, of a response whose status is known only now; `end` is None where no stream began."""
        self.close()
        path = self.request.scope["path"]
        self._metrics.response(path, status)
        if end is not None:
            self._metrics.stream(path, self._failure or end)


def admit(client: Client, prompts: int = 1, field: str | None = None) -> None:
    """Count a request for its key, as many times as it has prompts, which are in `field`.

    Raises ApiError when the key has no more now, or never has so many at once.
    """
    most = client.most
    if prompts > most:
        allowed = f"this key may send {most:g} a minute, so at most {int(most)} in one request"
        raise ApiError(400, f"{field}: {prompts} are too many; {allowed}", param=field, code="rate_limit_exceeded")
    wait = client.wait(prompts)
    if wait > 0:
        raise ApiError(429, "this key's limit is reached", code="rate_limit_exceeded", retry_after=wait)
    client.enter(prompts)


async def begin(
    request: Request, read: Callable[[ServeConfig], Awaitable[B]], prompts_in: str | None = None
) -> tuple[Call, B]:
    """The call that a request is, and its body. The body comes first: without it there is no model.

    `prompts_in`: the field that may have several prompts or texts, each of which counts as a request.
    """
    registry: Registry = request.app.state.registry
    body = await read(request.app.state.config)
    model = await registry.get(getattr(body, "model", None))  # which has one user more from here on
    call = request.state.call = Call(request, model)  # closed with the response, or by the application without one
    call.enter(1 if prompts_in is None else len(each_of(getattr(body, prompts_in))), prompts_in)
    return call, body


def stream_response(call: Call, events: AsyncGenerator[bytes, None]) -> Response:
    """A response of events that closes the call at its end."""
    return EventStream(events, call.config, call.close_stream)


async def json_response(call: Call, work: Awaitable[dict[str, Any] | bytes | list[bytes]]) -> Response:
    """A response of one object, or of its JSON, in parts where it is long; the work ends when the client goes."""
    try:
        data = await while_connected(call.request.receive, work)
    finally:
        call.close()
    if isinstance(data, list):
        return PartsResponse(data, call.config.write_timeout)
    return Response(data if isinstance(data, bytes) else orjson.dumps(data), media_type="application/json")
