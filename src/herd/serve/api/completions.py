"""POST /v1/completions: texts that go on. The contract is that of OpenAI's first API, which lm-eval measures through:
with `echo` and `logprobs` the answer has a log-probability for each token of the prompt, the first one null."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from herd.engine import Chunk, Completion
from herd.serve.api.answer_types import TextCompletion, gives
from herd.serve.api.answers import finite, new_id, token_text, total_of, usage_of
from herd.serve.api.body import read_body, takes
from herd.serve.api.context import Call, begin, json_response, stream_response
from herd.serve.api.fields import MOST_PROMPTS, Generation, Ids, each_of
from herd.serve.api.formats import ResponseFormat, held_to
from herd.serve.errors import bad
from herd.serve.parts import SLICE, lists_in_parts
from herd.serve.sse import DONE, event
from herd.serve.ticket import Ticket

_OF_LOGPROB = 24  # bytes, as they are here


class CompletionRequest(Generation):
    """OpenAI's request, and Herd's further fields."""

    UNSUPPORTED: ClassVar = {
        "suffix": "send the marks of Code Llama as token ids",
        "messages": "dialogues go to /v1/chat/completions",
    }
    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    )
    echo: bool | None = Field(default=None, description="Begin the text with the prompt.")
    logprobs: int | None = Field(default=None, ge=0, le=20, description="So many likely tokens at each place.")
    best_of: Literal[1] | None = None
    response_format: ResponseFormat | None = None
    max_tokens: int | None = Field(default=16, ge=0, le=1 << 30, description="Tokens to generate at most.")
    skip_special_tokens: bool = Field(default=True, description="Leave generated control tokens out of the text.")


@takes(CompletionRequest)
@gives(TextCompletion)
async def completions(request: Request) -> Response:
    """Continue texts."""
    call, body = await begin(request, lambda config: read_body(request, config, CompletionRequest), "prompt")
    if body.max_tokens == 0 and not (body.echo and body.logprobs is not None):
        raise bad("max_tokens", "0 is for scoring a prompt, with echo and logprobs")
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options", "needs stream to be true")
    if body.stream and body.echo:
        raise bad("echo", "is not there for streams")
    count, room = len(each_of(body.prompt)), max(1, call.config.max_queue)
    if body.stream and count > 1:
        raise bad("prompt", "a stream is of one prompt")
    if count > room:  # they wait together, and so would never find room
        raise bad("prompt", f"{count} prompts are too many for one request; so many may wait here: {room}")
    grammars = held_to(body.response_format, "response_format")
    sampling = body.sampling(
        max_tokens=body.max_tokens or (1 if body.max_tokens == 0 else None),
        logprobs=body.logprobs is not None or None,
        top_logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo and body.logprobs is not None) or None,
        skip_specials=body.skip_special_tokens,
        grammar=next(iter(grammars.values()), None),
    )
    n, config = body.n or 1, call.config
    prompts = await call.token_ids(body.prompt, "prompt")
    if n > config.max_n or n * len(prompts) > MOST_PROMPTS:
        raise bad("n", f"{n} answers to {len(prompts)} prompts are too many for one request")
    how: dict[str, Any] = {"prompt_in": "prompt", "n": n, "grammars": grammars}
    tickets = await call.submit_all(prompts, sampling, **how)
    answer = _Answer(call, tickets, body)
    if body.stream:
        return stream_response(call, answer.events(), "logprobs")
    return await json_response(call, answer.whole(), of_logprob=_OF_LOGPROB, logprobs_in="logprobs")


class _Answer:
    """The answers in OpenAI's form, as one object or as chunks. Answers of a prompt stand together."""

    def __init__(self, call: Call, tickets: list[Ticket], body: CompletionRequest) -> None:
        self._call = call
        self._tickets = tickets
        self._body = body
        self._generates = body.max_tokens != 0  # else one token is, as the engine knows no less, and not shown
        self._skipped = frozenset(call.tokenizer.specials.values() if body.skip_special_tokens else ())
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": call.created,
            "model": call.model.name,
            "system_fingerprint": call.model.fingerprint,
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        (ticket,) = self._tickets
        done: list[Completion] = []
        at = [0] * ticket.n
        async for j, chunk in ticket:
            logprobs = None
            if self._body.logprobs is not None:
                logprobs = self._logprobs([self._chosen(chunk.token_id, chunk.logprob, chunk.top_logprobs)], at[j])
            at[j] += len(chunk.text)
            if chunk.completion is not None:
                done.append(chunk.completion)
            if chunk.text or logprobs or chunk.finish_reason:
                choice = {"index": j, "text": chunk.text, "logprobs": logprobs, "finish_reason": _reason(chunk)}
                yield event({**self._head, "choices": [choice]})
        prompt_tokens = len(ticket.prompt)
        self._call.done(done, prompt_tokens)
        if self._body.wants_usage:
            yield event({**self._head, "choices": [], "usage": usage_of(prompt_tokens, done)})
        yield DONE

    async def whole(self) -> list[bytes]:
        """Its JSON, in parts."""
        parts = [orjson.dumps(self._head)[:-1], b',"choices":[']
        usages = []
        for i in range(len(self._tickets)):
            ticket = self._tickets.pop(0)
            done: dict[int, Completion] = {}
            async for j, chunk in ticket:
                if chunk.completion is not None:
                    done[j] = chunk.completion
            ordered = [done[j] for j in range(ticket.n)]
            self._call.done(ordered, len(ticket.prompt))
            usages.append(usage_of(len(ticket.prompt), ordered if self._generates else ()))
            for j, completion in enumerate(ordered):
                # A scored prompt can have a hundred thousand tokens, with twenty others for each: as objects they are
                # a hundred times as large.
                parts.append(b"," if i or j else b"")
                parts += await self._call.text_work(partial(self._choice, i * ticket.n + j, ticket, completion))
            self._call.settle(ticket)
        return [*parts, b'],"usage":', orjson.dumps(total_of(usages)), b"}"]

    def _choice(self, index: int, ticket: Ticket, completion: Completion) -> list[bytes]:
        """Its JSON, in parts."""
        text = completion.text if self._generates else ""
        tokens: list[_Token] = []
        if self._body.logprobs is not None:
            if self._body.echo:
                tokens += [_Token(ticket.prompt[0], None, None, in_text=not self._has_bos(ticket))]
                tops = completion.prompt_top_logprobs or [[]] * (len(ticket.prompt) - 1)
                tokens += map(_Token, ticket.prompt[1:], completion.prompt_logprobs or [], tops)
            if self._generates:
                tops = completion.top_logprobs or [[]] * len(completion.token_ids)
                tokens += map(self._chosen, completion.token_ids, completion.logprobs or [], tops)
        if self._body.echo:
            text = self._call.tokenizer.decode(ticket.prompt[self._has_bos(ticket) :]) + text
        logprobs = [b"null"]
        if self._body.logprobs is not None:
            logprobs = list(lists_in_parts(self._slices(tokens)))
        reason = _reason(completion) if self._generates else "length"
        head = orjson.dumps({"index": index, "text": text})[:-1]
        return [head, b',"logprobs":', *logprobs, b',"finish_reason":', orjson.dumps(reason), b"}"]

    def _has_bos(self, ticket: Ticket) -> bool:
        """BOS is put in front of texts here, and is none of theirs."""
        own = isinstance(self._body.prompt, str) or isinstance(self._body.prompt[0], str)
        return own and ticket.prompt[0] == self._call.tokenizer.bos_id

    def _chosen(self, token_id: int, logprob: float | None, top: list[tuple[int, float]] | None) -> _Token:
        """A token that was generated."""
        return _Token(token_id, logprob, top, in_text=token_id not in self._skipped)

    def _slices(self, tokens: list[_Token]) -> Iterator[dict[str, Any]]:
        """`_logprobs` of a few tokens after the other."""
        offset = 0
        for start in range(0, max(1, len(tokens)), SLICE):
            part = tokens[start : start + SLICE]
            found = self._logprobs(part, offset)
            yield found
            if part:
                offset = found["text_offset"][-1] + (len(found["tokens"][-1]) if part[-1].in_text else 0)

    def _logprobs(self, tokens: list[_Token], offset: int) -> dict[str, Any]:
        """OpenAI's four lists, of tokens from `offset` in the text on.

        Two tokens of the same text count as the likelier one in `top_logprobs`, where the token itself is in any case.
        """
        texts = [token_text(self._call.tokenizer, token.id)[0] for token in tokens]
        offsets = []
        for token, text in zip(tokens, texts, strict=True):
            offsets.append(offset)
            offset += len(text) if token.in_text else 0
        tops = []
        for token, text in zip(tokens, texts, strict=True):
            found: dict[str, float] = {}
            for token_id, logprob in token.top or ():
                found.setdefault(token_text(self._call.tokenizer, token_id)[0], finite(logprob))
            if token.logprob is not None:
                found.setdefault(text, finite(token.logprob))
            tops.append(None if token.logprob is None else found)
        return {
            "tokens": texts,
            "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class _Token:
    """`in_text`: the text has it, not only the lists beside the text."""

    def __init__(
        self, token_id: int, logprob: float | None, top: list[tuple[int, float]] | None, in_text: bool = True
    ) -> None:
        self.id, self.logprob, self.top, self.in_text = token_id, logprob, top, in_text


def _reason(ended: Chunk | Completion) -> str | None:
    """OpenAI knows "stop" and "length"."""
    reason = ended.finish_reason
    return None if reason is None else "length" if reason == "length" else "stop"
