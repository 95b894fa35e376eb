"""POST /v1/messages and /v1/messages/count_tokens: the same answers in Anthropic's shape."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response

from herd.engine import Chunk, Grammar
from herd.serve.api.answer_types import AnthropicMessage, TokenCount, gives
from herd.serve.api.answers import new_id
from herd.serve.api.body import NOT_THERE, Body, read_body, takes
from herd.serve.api.context import Call, begin, json_response, stream_response
from herd.serve.api.conversation import MOST_PARTS, CallIds, OfParts, characters_of, in_order, prompt_ids
from herd.serve.api.fields import Id, Text, checked_sampling
from herd.serve.api.formats import SchemaFormat, held_to
from herd.serve.api.tools import (
    FunctionName,
    FunctionTool,
    NamedFunction,
    NamedTool,
    Plan,
    Tool,
    ToolChoice,
    plan_tools,
)
from herd.serve.errors import bad, error_body
from herd.serve.sse import event
from herd.serve.ticket import Ticket
from herd.tokenizer import Message


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = Field(
        default=None, description="Taken; a key's own beginnings are shared in any case."
    )
    citations: Annotated[list[Any], Field(max_length=0)] | None = None


TextBlocks = Annotated[list[TextBlock], Field(max_length=MOST_PARTS, fail_fast=True)]


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: Id
    name: FunctionName
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None
    caller: None = None
    toolset_name: None = None


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: Id
    content: str | TextBlocks = ""
    is_error: bool | None = Field(default=None, description="Taken; the model sees the content.")
    cache_control: dict[str, Any] | None = None


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class Turn(Body):
    role: Literal["user", "assistant"]
    content: Annotated[str | Annotated[list[Block], Field(max_length=MOST_PARTS, fail_fast=True)], OfParts]


class AnthropicTool(Body):
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = Field(default=None, description="Calls are held to the schema with tool_choice auto too.")
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, tool: Any) -> Any:
        """Before the fields: tools of another kind lack what ours must have."""
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "custom":
            context = {"kind": repr(kind[:100]), "place": "type"}
            raise PydanticCustomError(NOT_THERE, "{kind} is not supported; allowed is 'custom', or no type", context)
        return tool


class AnthropicChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


class OutputConfig(Body):
    """What an answer must look like; what the client's `parse` sends."""

    format: SchemaFormat | None = None


class Thinking(Body):
    type: Literal["disabled"]
    budget_tokens: None = Field(default=None, description="Of a type that is not there.")
    display: None = Field(default=None, description="Of a type that is not there.")


class Metadata(Body):
    user_id: Id | None = None


class CountRequest(Body):
    """What is counted: all that becomes the prompt."""

    UNSUPPORTED: ClassVar = {"mcp_servers": "there are none"}
    model: str | None = Field(default=None, max_length=200)
    messages: Annotated[list[Turn], Field(min_length=1, max_length=4096, fail_fast=True)]
    system: str | TextBlocks | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: AnthropicChoice | None = None
    output_config: OutputConfig | None = Field(default=None, description="The schema that an answer is held to.")
    thinking: Thinking | None = Field(default=None, description="No Llama has any.")

    def plan(self) -> Plan:
        """What may be called, in the words of the other API."""
        choice = self.tool_choice
        names: dict[str, ToolChoice] = {"auto": "auto", "any": "required", "none": "none"}
        wanted: ToolChoice | None = None
        if choice is not None and choice.type == "tool":
            if choice.name is None:
                raise bad("tool_choice.name", "is needed for a tool")
            wanted = NamedTool(type="function", function=NamedFunction(name=choice.name))
        elif choice is not None:
            if choice.name is not None:
                raise bad("tool_choice.name", f"is for a tool, and the type is {choice.type}")
            wanted = names[choice.type]
        single = None if choice is None else choice.disable_parallel_tool_use
        return plan_tools(self.functions, wanted, None if single is None else not single, "input_schema")

    @property
    def functions(self) -> list[Tool]:
        return [
            Tool(
                type="function",
                function=FunctionTool(
                    name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
                ),
            )
            for tool in self.tools or ()
        ]

    def dialogue(self) -> list[Message]:
        """Messages for the tokenizer; a tool's result is a message of its own."""
        found: list[tuple[Message, CallIds]] = []
        if self.system:
            found.append(({"role": "system", "content": _text(self.system)}, CallIds()))
        for i, turn in enumerate(self.messages):
            found += _turn(f"messages.{i}.content", turn)
        if self.begins_answer:
            begun, where = found[-1][0], f"messages.{len(self.messages) - 1}.content"
            if begun.get("tool_calls"):
                raise bad(where, "the answer begins with a text; what these calls gave comes from the user")
            if not (text := begun["content"] or "") or text[-1].isspace():
                raise bad(where, "the text that the answer begins with is not empty and ends with no white space")
        return [found[i][0] for i in in_order([ids for _, ids in found])]

    @property
    def begins_answer(self) -> bool:
        """The last message is the assistant's, and the answer goes on with it."""
        return self.messages[-1].role == "assistant"


class MessagesRequest(CountRequest):
    """Anthropic's request."""

    UNSUPPORTED: ClassVar = {**CountRequest.UNSUPPORTED, "container": "there is none"}
    max_tokens: int = Field(ge=1, le=1 << 30)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1 << 30)
    stop_sequences: list[Text] | None = Field(default=None, max_length=16)
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    seed: int | None = Field(default=None, ge=0, le=(1 << 63) - 1)
    timeout: float | None = Field(default=None, gt=0, le=86_400, description="Seconds after which to give up.")

    def held(self) -> tuple[Plan, dict[str, Grammar]]:
        """What may be called, and the grammars that must be possible, by their fields."""
        plan = self.plan()
        wanted = None if self.output_config is None else self.output_config.format
        grammars = plan.grammars(held_to(wanted, "output_config.format"))
        if grammars and self.begins_answer:
            raise bad(next(iter(grammars)), "is not there for an answer that the last message begins")
        return plan, grammars


@takes(MessagesRequest)
@gives(AnthropicMessage)
async def messages(request: Request) -> Response:
    """Answer a dialogue."""
    call, body = await begin(request, lambda config: read_body(request, config, MessagesRequest))
    plan, grammars = await call.text_work(body.held)
    grammar = next(iter(grammars.values()), None)
    given = {name: getattr(body, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")}
    given |= {"stop": body.stop_sequences, "grammar": grammar, "skip_specials": not plan.functions}
    sampling = checked_sampling(given)
    prompt = await _prompt(call, body, plan, queued=True)
    how: dict[str, Any] = {"prompt_in": "messages", "continues_text": body.begins_answer, "grammars": grammars}
    ticket = await call.submit(prompt, sampling, **how)
    answer = _Answer(call, ticket, plan)
    if body.stream:
        return stream_response(call, answer.events())
    return await json_response(call, answer.whole())


@takes(CountRequest)
@gives(TokenCount)
async def count_tokens(request: Request) -> Response:
    """How long the prompt would be."""
    call, body = await begin(request, lambda config: read_body(request, config, CountRequest))
    prompt = await _prompt(call, body, await call.text_work(body.plan), queued=False)

    async def count() -> dict[str, Any]:
        return {"input_tokens": len(prompt)}

    return await json_response(call, count())


async def _prompt(call: Call, body: CountRequest, plan: Plan, *, queued: bool) -> list[int]:
    tools = [tool.described for tool in body.functions] if plan.described else None
    dialogue = body.dialogue()
    call.check_room(characters_of(dialogue, tools), "messages", queued=queued)
    return await call.text_work(lambda: prompt_ids(call.model.llm, dialogue, tools, begun=body.begins_answer))


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _turn(where: str, turn: Turn) -> list[tuple[Message, CallIds]]:
    """The messages of a turn, whose content is the field `where`, and the ids of calls in each."""
    if isinstance(turn.content, str):
        return [({"role": turn.role, "content": turn.content}, CallIds())]
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    named: list[tuple[str, str | None]] = []
    results: list[tuple[Message, CallIds]] = []
    for i, block in enumerate(turn.content):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolUseBlock):
            if turn.role != "assistant":
                raise bad(f"{where}.{i}", "only the assistant calls tools")
            named.append((f"{where}.{i}.id", block.id))
            calls.append({"function": {"name": block.name, "arguments": block.input}})
        else:
            if turn.role != "user":
                raise bad(f"{where}.{i}", "results of tools come from the user")
            ids = CallIds([(f"{where}.{i}.tool_use_id", block.tool_use_id)], gives=True)
            results.append((Message(role="tool", content=_text(block.content)), ids))
    text = "".join(texts)
    if calls:
        return [({"role": "assistant", "content": text, "tool_calls": calls}, CallIds(named))]
    return [*results, *([(Message(role=turn.role, content=text), CallIds())] if text or not results else [])]


class _Answer:
    """One answer in Anthropic's form: blocks of text and of calls, one after the other."""

    def __init__(self, call: Call, ticket: Ticket, plan: Plan) -> None:
        self._call = call
        self._ticket = ticket
        self._voice = plan.voice()
        self._blocks: list[dict[str, Any]] = []
        self._head = {
            "id": new_id("msg"),
            "type": "message",
            "role": "assistant",
            "model": call.model.name,
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """A failure in the middle is an event of its own, as Anthropic's clients look for those by name."""
        begun = False
        try:
            async for part in self._events():
                begun = True
                yield part
        except Exception as error:
            if not begun:
                raise
            yield event(error_body(self._call.fail(error), self._call.request.scope["path"]), "error")

    async def _events(self) -> AsyncGenerator[bytes, None]:
        begun = False
        async for _, chunk in self._ticket:
            if not begun:
                begun = True
                start = {**self._head, "content": [], **self._end(None), "usage": self._usage(None)}
                yield event({"type": "message_start", "message": start}, "message_start")
            for part in self._parts(chunk):
                yield event(part, part["type"])
            if chunk.completion is not None:
                if self._blocks:
                    yield event({"type": "content_block_stop", "index": len(self._blocks) - 1}, "content_block_stop")
                self._call.done([chunk.completion], len(self._ticket.prompt))
                end = {"type": "message_delta", "delta": self._end(chunk), "usage": self._usage(chunk)}
                yield event(end, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    async def whole(self) -> dict[str, Any]:
        last: Chunk | None = None
        async for _, chunk in self._ticket:
            self._parts(chunk)
            last = chunk
        assert last is not None and last.completion is not None
        self._call.done([last.completion], len(self._ticket.prompt))
        content = []
        for block in self._blocks:
            arguments = block.pop("partial", None)
            content.append(block if arguments is None else {**block, "input": _loaded(arguments)})
        return {**self._head, "content": content, **self._end(last), "usage": self._usage(last)}

    def _parts(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Events for what a chunk adds."""
        deltas = self._voice.push(chunk.text)
        if chunk.finish_reason is not None:
            deltas += self._voice.finish()
        out: list[dict[str, Any]] = []
        for delta in deltas:
            if delta.get("content"):
                if not self._blocks or self._blocks[-1]["type"] != "text":
                    out += self._begin({"type": "text", "text": ""})
                self._blocks[-1]["text"] += delta["content"]
                out.append(self._delta({"type": "text_delta", "text": delta["content"]}))
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    block = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}}
                    out += self._begin(block)
                    self._blocks[-1]["partial"] = ""
                elif call["function"]["arguments"]:
                    self._blocks[-1]["partial"] += call["function"]["arguments"]
                    part = {"type": "input_json_delta", "partial_json": call["function"]["arguments"]}
                    out.append(self._delta(part))
        return out

    def _begin(self, block: dict[str, Any]) -> list[dict[str, Any]]:
        last = len(self._blocks) - 1
        stop = [{"type": "content_block_stop", "index": last}] if self._blocks else []
        self._blocks.append(dict(block))
        return [*stop, {"type": "content_block_start", "index": last + 1, "content_block": block}]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _end(self, chunk: Chunk | None) -> dict[str, Any]:
        if chunk is None or chunk.completion is None:
            return {"stop_reason": None, "stop_sequence": None}
        stop = chunk.completion.stop
        reason = {"tool_calls": "tool_use", "length": "max_tokens"}.get(
            self._voice.reason(chunk.completion.finish_reason)
        )
        sequence = stop if isinstance(stop, str) else None
        return {"stop_reason": reason or ("stop_sequence" if sequence else "end_turn"), "stop_sequence": sequence}

    def _usage(self, chunk: Chunk | None) -> dict[str, int]:
        """The prompt's tokens without those that were remembered, which are told apart."""
        completion = None if chunk is None else chunk.completion
        cached = 0 if completion is None else completion.timings.reused_tokens
        return {
            "input_tokens": len(self._ticket.prompt) - cached,
            "cache_read_input_tokens": cached,
            "output_tokens": 0 if completion is None else completion.usage.completion_tokens,
        }


def _loaded(arguments: str) -> Any:
    """Arguments of a call; what the model could not finish is given as it is."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):  # a thousand lists inside each other are deeper than Python goes
        return {"unfinished": arguments}
