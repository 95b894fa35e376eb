"""Messages as OpenAI's chat API has them, checked, as the tokenizer takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import orjson
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from herd.engine import LLM
from herd.errors import UsageError
from herd.serve.api.body import NOT_THERE, Body
from herd.serve.errors import bad
from herd.tokenizer import Message

MOST_PARTS = 4096
Name = Annotated[str, Field(min_length=1, max_length=256)]
Parsed = Annotated[Any, Field(description="Taken and not used: what a client's `parse` adds to what it got.")]


NOT_YET = {
    **dict.fromkeys(("image_url", "image", "input_image"), "images"),
    **dict.fromkeys(("input_audio", "audio"), "sounds"),
    **dict.fromkeys(("file", "input_file", "document"), "files"),
}
"""What parts of a content may be in OpenAI's and Anthropic's APIs, by their types, and not here."""


def check_parts(content: Any) -> Any:
    """A content as it is, before its type is checked: of that, all members would complain, and none say why."""
    for place, part in _parts(content):
        kind = part.get("type")
        if isinstance(kind, str) and kind in NOT_YET:
            raise PydanticCustomError(NOT_THERE, "{what} are not there yet", {"what": NOT_YET[kind], "place": place})
    return content


def _parts(content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parts and their places; after what a tool gave, the parts of that."""
    for i, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict):
            yield str(i), part
            inside = part.get("content")
            for j, inner in enumerate(inside if isinstance(inside, list) else ()):
                if isinstance(inner, dict):
                    yield f"{i}.content.{j}", inner


OfParts = BeforeValidator(check_parts)


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: Name
    arguments: str = Field(description="A JSON object, as text.")
    parsed_arguments: Parsed = None


class ToolCall(Body):
    """A call that the assistant made earlier."""

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: FunctionCall


class ChatMessage(Body):
    """One message. Fields that clients send back from answers are taken where they are empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(max_length=MOST_PARTS, fail_fast=True)] | None, OfParts
    ] = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = Field(
        default=None, description="Of the call that gave this; it may be left out where only one waits."
    )
    name: Name | None = Field(default=None, description="Taken and not used: no Llama is told of it.")
    parsed: Parsed = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    reasoning: None = None

    def message(self, where: str) -> Message:
        """The same for the tokenizer. Raises ApiError."""
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise bad(f"{where}.content", "a message needs a text")
        if self.tool_calls and self.role != "assistant":
            raise bad(f"{where}.tool_calls", "only the assistant calls tools")
        if self.tool_call_id is not None and self.role != "tool":
            raise bad(f"{where}.tool_call_id", "only what a tool gave has it")
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        message: Message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        for i, call in enumerate(self.tool_calls or ()):
            if not _is_object(call.function.arguments):
                raise bad(
                    f"{where}.tool_calls.{i}.function.arguments",
                    "is no JSON object; a call that was cut cannot go back",
                )
        if self.tool_calls:
            message["tool_calls"] = [
                {"function": {"name": call.function.name, "arguments": call.function.arguments}}
                for call in self.tool_calls
            ]
        return message

    def ids(self, where: str) -> CallIds:
        if self.role == "tool":
            return CallIds([(f"{where}.tool_call_id", self.tool_call_id)], gives=True)
        return CallIds([(f"{where}.tool_calls.{k}.id", call.id) for k, call in enumerate(self.tool_calls or ())])


class CallIds(NamedTuple):
    """The ids of the calls in a message, or with `gives` the one of the call that gave it; each after its field."""

    named: Sequence[tuple[str, str | None]] = ()
    gives: bool = False


def in_order(messages: Sequence[CallIds]) -> list[int]:
    """The numbers of messages, those of what calls gave behind the message with the calls, in the order of these.

    A Llama is told of no ids: it takes what comes first for what the first call gave. Raises ApiError, with the field,
    for what no call waits for, for what may be of several, and where some calls of a message gave something and others
    nothing.
    """
    given: list[list[int | None]] = [[] if ids.gives else [None] * len(ids.named) for ids in messages]
    waiting: dict[str | tuple[int, int], tuple[int, int]] = {}
    for i, ids in enumerate(messages):
        for k, (field, name) in enumerate(ids.named):
            shown = repr(name and name[:100])
            if not ids.gives:
                key = (i, k) if name is None else name
                if waiting.pop(key, (-1, -1))[0] == i:
                    raise bad(field, f"{shown} is there twice")
                waiting[key] = (i, k)
            elif name is None and len(waiting) > 1:
                raise bad(field, f"is missing, and {len(waiting)} calls wait")
            else:
                call = waiting.pop(next(iter(waiting), "") if name is None else name, None)
                if call is None:
                    raise bad(field, f"no call waits for this; got {shown}")
                given[call[0]][call[1]] = i
    order: list[int] = []
    for i, ids in enumerate(messages):
        found = [j for j in given[i] if j is not None]
        if found and len(found) < len(given[i]):
            raise bad(ids.named[given[i].index(None)][0], "this call gave nothing, and others of its message did")
        order += [] if ids.gives else [i, *found]
    return order


def _is_object(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False


def characters_of(messages: list[Message], tools: list[dict[str, Any]] | None) -> int:
    """How long a dialogue is before it is tokens."""
    total = len(orjson.dumps(tools)) if tools else 0
    for message in messages:
        total += len(message.get("content") or "")
        total += sum(len(str(call["function"]["arguments"])) for call in message.get("tool_calls") or ())
    return total


def dialogue(messages: list[ChatMessage]) -> list[Message]:
    """All messages for the tokenizer."""
    found = [message.message(f"messages.{i}") for i, message in enumerate(messages)]
    return [found[i] for i in in_order([message.ids(f"messages.{i}") for i, message in enumerate(messages)])]


_CLOSED = ("llama2", "codellama")  # formats in which an answer stands between spaces: it is whole, or not there


def prompt_ids(
    llm: LLM,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    field: str = "messages",
    *,
    begun: bool = False,
) -> list[int]:
    """The prompt that a dialogue is; `begun`: its last message is the beginning of the answer.

    Raises ApiError with the field that has what the model's format cannot say.
    """
    try:
        if not begun:
            return llm.chat_ids(messages, tools)
        if llm.tokenizer.chat_format in _CLOSED:
            raise bad(field, f"in {llm.tokenizer.chat_format} an answer follows what the user says")
        return llm.tokenizer.encode_dialog(messages, tools).ids[:-1]  # all but the end of the message
    except UsageError as error:
        raise bad(_at_fault(llm, tools, field), str(error)) from None


def _at_fault(llm: LLM, tools: list[dict[str, Any]] | None, field: str) -> str:
    """`tools` where these alone cannot be said, or else `field`."""
    try:
        llm.chat_ids([{"role": "user", "content": ""}], tools)
    except UsageError:
        return "tools"
    return field
