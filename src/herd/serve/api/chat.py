"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from herd.engine import Completion, Grammar, Sampling
from herd.serve.api.answer_types import ChatCompletion, gives
from herd.serve.api.answers import chat_logprob, new_id, usage_of
from herd.serve.api.body import read_body, takes
from herd.serve.api.context import Call, begin, json_response, stream_response
from herd.serve.api.conversation import ChatMessage, characters_of, dialogue, prompt_ids
from herd.serve.api.fields import Generation
from herd.serve.api.formats import ResponseFormat, held_to
from herd.serve.api.tools import Plan, Tool, ToolChoice, plan_tools
from herd.serve.errors import bad
from herd.serve.sse import DONE, event
from herd.serve.ticket import Ticket


class ChatRequest(Generation):
    """OpenAI's request, and Herd's further fields."""

    UNSUPPORTED: ClassVar = {
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": "answers are texts",
        "prediction": "load the model with a draft model",
        "verbosity": "no Llama has it",
        "web_search_options": "there is no search",
        "moderation": "there is no moderation",
    }
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1 << 30, description="The same as max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none"] | None = Field(default=None, description="No Llama has another one.")
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None

    def plan(self) -> tuple[Sampling, Plan, dict[str, Grammar]]:
        """How tokens are chosen, what tools may be called, and the grammars that must be possible, by their fields."""
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise bad("max_completion_tokens", "differs from max_tokens, which means the same")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad("top_logprobs", "needs logprobs to be true")
        if self.stream_options is not None and not self.stream:
            raise bad("stream_options", "needs stream to be true")
        plan = plan_tools(self.tools, self.tool_choice, self.parallel_tool_calls)
        grammars = plan.grammars(held_to(self.response_format, "response_format"))
        grammar = next(iter(grammars.values()), None)
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        # A call may begin with a control token; elsewhere they are no part of what is said.
        return self.sampling(max_tokens=limit, grammar=grammar, skip_specials=not plan.functions), plan, grammars


@takes(ChatRequest)
@gives(ChatCompletion)
async def chat_completions(request: Request) -> Response:
    """Answer a dialogue, at once or as it comes."""
    call, body = await begin(request, lambda config: read_body(request, config, ChatRequest))
    sampling, plan, grammars = await call.text_work(body.plan)
    messages = dialogue(body.messages)
    tools = [tool.described for tool in body.tools or ()] if plan.described else None
    call.check_room(characters_of(messages, tools), "messages")
    prompt = await call.text_work(lambda: prompt_ids(call.model.llm, messages, tools))
    ticket = await call.submit(
        prompt,
        sampling,
        prompt_in="messages",
        limit_in="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        n=body.n,
        continues_text=False,
        grammars=grammars,
    )
    answer = _Answer(call, ticket, body, plan)
    if body.stream:
        return stream_response(call, answer.events())
    return await json_response(call, answer.whole())


class _Answer:
    """The answers to one request in OpenAI's form, as one object or as chunks."""

    def __init__(self, call: Call, ticket: Ticket, body: ChatRequest, plan: Plan) -> None:
        self._call = call
        self._ticket = ticket
        self._body = body
        self._voices = [plan.voice() for _ in range(ticket.n)]
        self._head = {
            "id": new_id("chatcmpl"),
            "created": call.created,
            "model": call.model.name,
            "system_fingerprint": call.model.fingerprint,
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        completions: list[Completion] = []
        silent = set(range(self._ticket.n))
        async for j, chunk in self._ticket:
            if j in silent:  # not before the first token: until then an error is a status
                silent.remove(j)
                yield self._chunk(j, {"role": "assistant", "content": ""})
            voice = self._voices[j]
            deltas = voice.push(chunk.text)
            reason = None
            if chunk.finish_reason is not None:
                assert chunk.completion is not None
                completions.append(chunk.completion)
                deltas += voice.finish()
                reason = voice.reason(chunk.finish_reason)
            logprobs = None
            if self._body.logprobs:
                logprobs = {"content": [chat_logprob(self._call.tokenizer, chunk)], "refusal": None}
                deltas = deltas or [{}]
            for delta in deltas:
                yield self._chunk(j, delta, logprobs)
                logprobs = None  # a token's goes out once
            if reason is not None:
                yield self._chunk(j, {}, None, reason)
        self._call.done(completions, len(self._ticket.prompt))
        if self._body.wants_usage:
            usage = usage_of(len(self._ticket.prompt), completions)
            yield event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield DONE

    async def whole(self) -> dict[str, Any]:
        logprobs: list[list[orjson.Fragment]] = [[] for _ in self._voices]
        completions: dict[int, Completion] = {}
        async for j, chunk in self._ticket:
            self._voices[j].push(chunk.text)
            if self._body.logprobs:
                # As JSON it is one object; as it stands it would be sixty, for Python to look through until the end.
                logprobs[j].append(orjson.Fragment(orjson.dumps(chat_logprob(self._call.tokenizer, chunk))))
            if chunk.completion is not None:
                self._voices[j].finish()
                completions[j] = chunk.completion
        done = [completions[j] for j in range(self._ticket.n)]
        self._call.done(done, len(self._ticket.prompt))
        choices = [
            {
                "index": j,
                "message": voice.message(),
                "logprobs": {"content": logprobs[j], "refusal": None} if self._body.logprobs else None,
                "finish_reason": voice.reason(done[j].finish_reason),
            }
            for j, voice in enumerate(self._voices)
        ]
        usage = usage_of(len(self._ticket.prompt), done)
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def _chunk(
        self, j: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> bytes:
        choice = {"index": j, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        if self._body.wants_usage:
            chunk["usage"] = None
        return event(chunk)
