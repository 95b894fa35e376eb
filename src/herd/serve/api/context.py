"""What the handlers of requests for text have in common: the model, the caller, and who must be told at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any, TypeVar, cast

import orjson
from starlette.requests import Request
from starlette.responses import Response

from herd.engine import Completion, Grammar, Sampling
from herd.engine.prompts import check_ids
from herd.errors import ContextLengthExceeded, UsageError
from herd.serve.api.body import Body
from herd.serve.api.fields import each_of
from herd.serve.bodies import Answers
from herd.serve.config import ServeConfig
from herd.serve.errors import SHORTEN, ApiError, as_api_error, bad, no_room
from herd.serve.keys import Client
from herd.serve.metrics import Metrics
from herd.serve.parts import PartsResponse
from herd.serve.pools import Pool, Pools
from herd.serve.registry import Model, Registry
from herd.serve.sse import End, EventStream, end_with, while_connected
from herd.serve.ticket import Ticket, too_late
from herd.tokenizer import Tokenizer

B = TypeVar("B", bound=Body)
H = TypeVar("H", bound=Callable[..., Any])
T = TypeVar("T")
log = logging.getLogger("herd.serve")

_OF_LOGPROB = 80  # bytes, as chat has them; in a stream, objects wait that are twice as large
_CHARACTERS_PER_TOKEN = 16  # no text of any language has more than 6


class Call:
    """One request for text that was admitted, from its arrival to its end.

    `end`: when it is given up, by the clock of the event loop; `late`: with what error.
    """

    def __init__(self, request: Request, model: Model, end: float, late: Callable[[], ApiError]) -> None:
        state = request.app.state
        self.request = request
        self.model = model
        self.config: ServeConfig = state.config
        self.client: Client = request.scope["state"]["client"]
        self.created = int(time.time())
        self._metrics: Metrics = state.metrics
        self._pools: Pools = state.pools
        self._start = time.perf_counter()
        self._answers: Answers = state.answers
        self._tickets: list[Ticket] = []
        self._tokens = 0  # that were taken, without those of the tickets
        self._reserved = 0  # tokens that were counted for the key before they were taken
        self._held = 0  # bytes of its answer
        self._works = self._open = True
        self.end = end
        self.late = late
        self._failure: End | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.llm.tokenizer

    @property
    def vocabulary(self) -> int:
        """Number of tokens. A model may have further rows, which stand for none and are never chosen."""
        return min(self.model.llm.config.vocab_size, self.tokenizer.vocab_size)

    @property
    def most_characters(self) -> int:
        """Of a prompt: more cannot fit in the context."""
        return _CHARACTERS_PER_TOKEN * self.model.llm.context

    def check_room(self, characters: int, param: str, *, queued: bool = True, beside: bool = False) -> None:
        """Refuse a text whose turn would come too late, or that cannot fit, before it is made into tokens.

        That takes seconds where it is a thousand times too long. `queued`: it waits for a turn, `beside` for one of the
        work beside the batch.
        """
        if queued:
            self.model.driver.check_wait(self.client, beside=beside)
        most = self.most_characters
        if characters > most:
            message = (
                f"This model's context is {self.model.llm.context} tokens; a text of more than {_CHARACTERS_PER_TOKEN} "
                f"characters for each, {most} in all, is refused unread, and the request has {characters}"
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
                    found.append(check_ids(ids, self.vocabulary))
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
        limit_in: str = "max_tokens",
        advice: str = SHORTEN,
        n: int | None = None,
        continues_text: bool = True,
        grammars: Mapping[str, Grammar],
    ) -> Ticket:
        """`submit_all` of one prompt."""
        how: dict[str, Any] = {"prompt_in": prompt_in, "limit_in": limit_in, "advice": advice}
        how |= {"n": n, "continues_text": continues_text, "grammars": grammars}
        (ticket,) = await self.submit_all([prompt], sampling, **how)
        return ticket

    async def submit_all(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        prompt_in: str,
        limit_in: str = "max_tokens",
        advice: str = SHORTEN,
        n: int | None = None,
        continues_text: bool = True,
        grammars: Mapping[str, Grammar],
    ) -> list[Ticket]:
        """Queue answers to prompts; they are given up when the call is closed.

        `grammars`: those that must be possible, by the fields of the request where they are, with that of `sampling`.
        `prompt_in`: the field that one which is too long came from, with `advice` on that; `limit_in`: the one that has
        the tokens of an answer.
        """
        if n is not None and n > self.config.max_n:
            raise bad("n", f"{n} is more than the {self.config.max_n} answers that a request may have")
        size = self.vocabulary
        for field, ids in (("logit_bias", sampling.logit_bias or ()), ("stop_token_ids", sampling.stop_token_ids)):
            if (most := max(ids, default=0)) >= size:
                raise bad(field, f"token {most} is none of the model's {size}")
        free = replace(sampling, grammar=None)
        try:
            tokens = sum(len(prompt) + (n or 1) * self.model.llm.max_tokens(prompt, free) for prompt in prompts)
        except ContextLengthExceeded as error:
            where = {"prompt_in": prompt_in, "limit_in": limit_in}
            raise no_room(error, sampling.max_tokens, **where, advice=advice) from None
        for field, grammar in grammars.items():  # each is compiled once, which may take a second
            try:
                given = replace(sampling, grammar=grammar)
                await self._beside(self._pools.grammars, partial(self.model.llm.max_tokens, prompts[0], given))
            except UsageError as error:
                raise bad(field, str(error)) from None
        left = self.end - asyncio.get_running_loop().time()
        if left <= 0:
            raise self.late()
        self.reserve(tokens, prompt_in)
        for prompt in prompts:
            ticket = self.model.driver.submit(
                prompt,
                sampling,
                self.client,
                n=n or 1,
                continues_text=continues_text,
                deadline=left,
                late=self.late,
            )
            self._tickets.append(ticket)
        return self._tickets[:]

    def reserve(self, tokens: int, field: str) -> None:
        """Count the tokens that the request may take; what it does not take is given back at its end.

        Raises ApiError when the key has no more now, or never has so many, as it asks for in `field`.
        """
        most = self.client.most_tokens
        if tokens > most:
            message = (
                f"{field}: with its answers this may take {tokens:,} tokens; this key may take {most:,.0f} a minute, "
                "so at most as many in one request"
            )
            raise ApiError(400, message, param=field, code="rate_limit_exceeded")
        if (wait := self.client.wait_for_tokens(tokens)) > 0:
            raise _limited(self.client, "tokens_per_minute", wait)
        self.client.reserve(tokens)
        self._reserved += tokens

    def expect(self, size: int, field: str) -> None:
        """The answer may have so many bytes, which count for the key until they are sent.

        Raises ApiError when too many wait to be sent, or it never could have so many, as it asks for in `field`.
        """
        most = self._answers.most_of_one
        if size > most:
            message = f"the answer may have {size >> 20} MiB, of {most >> 20} at most; ask for less at a time"
            raise bad(field, message, "answer_too_large")
        self._answers.hold(self.client.name, size)
        self._held += size

    def made(self, size: int, field: str) -> None:
        """The answer has so many bytes, which may be more than were expected, and the model is needed no longer."""
        self.finish()
        self.expect(max(0, size - self._held), field)

    def expected_bytes(self, of_logprob: int) -> int:
        """Of the answers that are queued, at most, about."""
        return sum(ticket.json_bytes(of_logprob) for ticket in self._tickets)

    def settle(self, ticket: Ticket) -> None:
        """All of it has been read, and is kept no longer."""
        self._tickets.remove(ticket)
        self._tokens += ticket.tokens

    async def text_work(self, work: Callable[[], T]) -> T:
        """Run what may take long with long texts beside the event loop. Raises ClientGone when nobody waits for it."""
        return await self._beside(self._pools.texts, work)

    async def _beside(self, pool: Pool, work: Callable[[], T]) -> T:
        async with until(self.end, self.late):
            return await while_connected(self.request.receive, pool.run(self.client.name, work))

    def done(self, completions: Sequence[Completion], prompt_tokens: int) -> None:
        """Answers are complete, or as much of prompts that need none as was computed: what that took is counted."""
        if not completions:
            self._tokens += prompt_tokens
        self._metrics.answered(self.model.name, completions, prompt_tokens)

    def finish(self) -> None:
        """The model is needed no longer, however that came."""
        if not self._works:
            return
        self._works = False
        self.model.users -= 1
        for ticket in self._tickets:
            self.model.driver.cancel(ticket)
        # What was computed counts, also where nobody waited for the end of it.
        self._tokens += sum(ticket.tokens for ticket in self._tickets)
        self._tickets.clear()  # a connection keeps its last call, and so would all that was computed for it

    def close(self) -> None:
        """The request is over: its answer has been sent, or there is none."""
        if not self._open:
            return
        self._open = False
        self.finish()
        self._answers.free(self.client.name, self._held)
        self.client.leave(self._tokens, self._reserved)
        self._metrics.seconds(self.request.scope["path"], time.perf_counter() - self._start)

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


@contextlib.asynccontextmanager
async def until(end: float, late: Callable[[], ApiError]) -> AsyncIterator[None]:
    """A block that ends with the error `late` when it is not over by then, by the clock of the event loop."""
    limit = asyncio.timeout_at(end)
    try:
        async with limit:
            yield
    except TimeoutError:
        if limit.expired():
            raise late() from None
        raise


def admit(client: Client) -> None:
    """Count a request for its key, before any of it is read. Raises ApiError when the key has no more now."""
    limit, wait = client.wait()
    if wait > 0:
        raise _limited(client, limit, wait)
    client.enter()


def admit_prompts(client: Client, prompts: int, field: str | None) -> None:
    """Count the further ones where a request that was admitted has several prompts, which are in `field`.

    Raises ApiError when the key has no more now, or never has so many at once: then the request counts for nothing.
    """
    most = client.most
    wait = client.wait_for_prompts(prompts - 1)
    if prompts <= most and wait == 0:
        client.take_prompts(prompts - 1)
        return
    client.take_prompts(-1)
    if prompts <= most:
        raise _limited(client, "requests_per_minute", wait)
    allowed = f"this key may send {most:g} a minute, so at most {int(most)} in one request"
    raise ApiError(400, f"{field}: {prompts} are too many; {allowed}", param=field, code="rate_limit_exceeded")


def _limited(client: Client, limit: str, wait: float) -> ApiError:
    """`limit`: the field of the key's limits that is reached, for so many seconds."""
    message = f"this key's limit is reached: {limit} is {getattr(client.limits, limit):,.10g}"
    return ApiError(429, message, code="rate_limit_exceeded", retry_after=wait)


def counted(handler: H) -> H:
    """A handler of JSON whose requests count for their key, though they ask for no text."""

    @wraps(handler)
    async def answer(request: Request) -> Response:
        client: Client = request.scope["state"]["client"]
        answers: Answers = request.app.state.answers
        size = 0
        admit(client)

        def close() -> None:
            answers.free(client.name, size)
            client.leave(0)

        try:
            body = bytes(cast("Response", await handler(request)).body)
            answers.hold(client.name, len(body))
        except BaseException:
            close()
            raise
        size = len(body)
        return PartsResponse([body], close)

    answer.counted = True  # type: ignore[attr-defined]
    return cast("H", answer)


async def begin(
    request: Request, read: Callable[[ServeConfig], Awaitable[B]], prompts_in: str | None = None
) -> tuple[Call, B]:
    """The call that a request is, and its body. The request is counted first, as reading costs too; the body comes
    next, as without it there is no model.

    `prompts_in`: the field that may have several prompts or texts, each of which counts as a request.
    """
    registry: Registry = request.app.state.registry
    config: ServeConfig = request.app.state.config
    client: Client = request.scope["state"]["client"]
    arrived = asyncio.get_running_loop().time()
    if unread := [name for name in request.query_params if name != "beta"]:  # Anthropic's client says ?beta=true
        raise bad(unread[0][:100], "this path takes no query", code="unknown_parameter")
    admit(client)
    try:
        body = await read(config)
        timeout = getattr(body, "timeout", None)
        own = None if timeout is None or timeout >= config.deadline else timeout
        end, late = arrived + (own or config.deadline), partial(too_late, own)
        if prompts_in is not None:
            admit_prompts(client, len(each_of(getattr(body, prompts_in))), prompts_in)
        async with until(end, late):
            model = await registry.get(getattr(body, "model", None))  # which has one user more from here on
    except BaseException:
        client.leave(0)
        raise
    call = request.state.call = Call(request, model, end, late)  # closed with the response, or by the application
    return call, body


def stream_response(call: Call, events: AsyncGenerator[bytes, None], logprobs_in: str = "top_logprobs") -> Response:
    """A response of events that closes the call at its end.

    Who reads slowly lets them wait, so they count as the bytes of a whole answer do. `logprobs_in`: the field that asks
    for log-probabilities.
    """
    call.expect(call.expected_bytes(_OF_LOGPROB), logprobs_in)
    return EventStream(events, call.config, call.close_stream)


async def json_response(
    call: Call,
    work: Coroutine[Any, Any, dict[str, Any] | list[bytes]],
    *,
    of_logprob: int = _OF_LOGPROB,
    logprobs_in: str = "top_logprobs",
) -> Response:
    """A response of one object, or of its JSON in parts where it is long; the work ends when the client goes.

    `of_logprob`: bytes for each log-probability, which the field `logprobs_in` asks for.
    """
    try:
        call.expect(call.expected_bytes(of_logprob), logprobs_in)
        async with until(call.end, call.late):
            data = await while_connected(call.request.receive, work)
        parts = data if isinstance(data, list) else [orjson.dumps(data)]
        call.made(sum(map(len, parts)), logprobs_in)
    except BaseException:
        work.close()
        call.close()
        raise
    return PartsResponse(parts, call.close)
