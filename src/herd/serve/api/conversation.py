"""Messages as OpenAI's chat API has them, checked, as the tokenizer takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from herd.serve.api.body import NOT_THERE, Body
from herd.serve.errors import bad
from herd.tokenizer import Message

MOST_PARTS = 4096
Name = Annotated[str, Field(min_length=1, max_length=256)]


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
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
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
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        message: Message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        for i, call in enumerate(self.tool_calls or ()):
            if not _is_object(call.function.arguments):
                raise bad(f"{where}.tool_calls.{i}.function.arguments", "is no JSON object")
        if self.tool_calls:
            message["tool_calls"] = [{"function": call.function.model_dump()} for call in self.tool_calls]
        return message


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
    return [message.message(f"messages.{i}") for i, message in enumerate(messages)]
