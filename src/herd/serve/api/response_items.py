"""The items that a conversation of /v1/responses consists of: messages, calls of functions, and what these gave.

They come in requests and out of the store in the same form, are checked in the same way, and become the messages that
the tokenizer takes.
"""

from __future__ import annotations

import secrets
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from herd.serve.api.body import Body, parse_body
from herd.serve.api.conversation import MOST_PARTS, NOT_YET, CallIds, Parsed, in_order
from herd.serve.api.tools import FunctionName
from herd.serve.errors import ApiError, bad
from herd.tokenizer import Message

_OF_A_TOKEN = 16  # characters, at most
Name = Annotated[str, Field(min_length=1, max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]


def new_item_id(prefix: str) -> str:
    """An identifier that is given once, as OpenAI writes them."""
    return f"{prefix}_{secrets.token_hex(16)}"


def unsupported(param: str, what: object, advice: str) -> ApiError:
    """Something of OpenAI's that is not there."""
    message = f"{param}: {str(what)[:100]!r} is not supported; {advice}"
    return ApiError(400, message, param=param, code="unsupported_parameter")


class InputText(Body):
    """What anybody but the assistant says."""

    type: Literal["input_text"]
    text: str

    def part(self) -> dict[str, Any]:
        return {"type": "input_text", "text": self.text}


class OutputText(Body):
    """What the assistant said."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = Field(default=None, max_length=1 << 20, description="Taken and not used.")
    parsed: Parsed = None

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}


class MessageItem(Body):
    """A message. The assistant's has parts of type output_text, the others' input_text."""

    UNSUPPORTED: ClassVar = {"phase": "no Llama has it"}
    type: Literal["message"] = "message"
    id: Name = Field(default_factory=lambda: new_item_id("msg"))
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[InputText | OutputText], Field(max_length=MOST_PARTS, fail_fast=True)]
    status: Status = "completed"

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def stored(self) -> dict[str, Any]:
        """As OpenAI lists it."""
        kind = OutputText if self.role == "assistant" else InputText
        parts = self.content
        if isinstance(parts, str):
            parts = [kind.model_validate({"type": _PART_OF[kind], "text": parts})]
        content = [part.part() for part in parts]
        return {"id": self.id, "type": "message", "role": self.role, "status": self.status, "content": content}


class CallItem(Body):
    """A call that the assistant made. One that broke off ("incomplete") is not shown to the model."""

    UNSUPPORTED: ClassVar = {"namespace": "tools are functions", "caller": "there are no programs", "async": "wait"}
    type: Literal["function_call"]
    id: Name = Field(default_factory=lambda: new_item_id("fc"))
    call_id: Name
    name: FunctionName
    arguments: str = Field(description="A JSON object, as text.")
    parsed_arguments: Parsed = None
    status: Status = "completed"

    def stored(self) -> dict[str, Any]:
        """As OpenAI lists it."""
        return self.model_dump(exclude={"parsed_arguments"})


class OutputItem(Body):
    """What a call gave."""

    UNSUPPORTED: ClassVar = {
        "namespace": "tools are functions",
        "caller": "there are no programs",
        "name": "use call_id",
    }
    type: Literal["function_call_output"]
    id: Name = Field(default_factory=lambda: new_item_id("fco"))
    call_id: Name
    output: str | Annotated[list[InputText], Field(max_length=MOST_PARTS, fail_fast=True)]
    status: Status = "completed"

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)

    def stored(self) -> dict[str, Any]:
        """As OpenAI lists it."""
        return self.model_dump()


Item = MessageItem | CallItem | OutputItem
_KINDS: Mapping[str, type[Item]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": OutputItem,
}
_PART_OF: Mapping[type[InputText | OutputText], str] = {InputText: "input_text", OutputText: "output_text"}


def read_item(data: object, where: str) -> Item:
    """An item out of JSON. `where` is what errors call it. A message may leave its type out."""
    if not isinstance(data, dict):
        raise bad(where, "an item is an object")
    given = {name: value for name, value in data.items() if value is not None}  # clients send back what they got
    kind = given.setdefault("type", "message")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise unsupported(f"{where}.type", kind, f"items are {', '.join(_KINDS)}")
    part = OutputText if kind == "message" and given.get("role") == "assistant" else InputText
    for name in ("content", "output"):
        if isinstance(given.get(name), list):
            given[name] = [_read_part(each, f"{where}.{name}.{i}", part) for i, each in enumerate(given[name])]
    return parse_body(given, _KINDS[kind], f"{where}.")


def _read_part(data: object, where: str, kind: type[InputText | OutputText]) -> InputText | OutputText:
    if not isinstance(data, dict):
        raise bad(where, "a part is an object")
    if (given := data.get("type")) != _PART_OF[kind]:
        other = NOT_YET.get(given) if isinstance(given, str) else None
        advice = f"here it is {_PART_OF[kind]}" if other is None else f"{other} are not there yet"
        raise unsupported(f"{where}.type", given, advice)
    return parse_body({name: value for name, value in data.items() if value is not None}, kind, f"{where}.")


def check_ids(items: Iterable[Item]) -> None:
    """Raises ApiError where two items of a request have one id: a listing that goes on after it would never end."""
    seen: set[str] = set()
    for i, item in enumerate(items):
        if item.id in seen:
            raise bad(f"input.{i}.id", f"{item.id[:100]!r} is there twice")
        seen.add(item.id)


def with_outputs(items: Sequence[Item], own: int = 0) -> list[Item]:
    """The items, what calls gave behind these, in their order. `own`: where those of the request begin.

    Raises ApiError as `in_order` does.
    """
    groups: list[list[Item]] = []  # as they become messages
    named: list[list[tuple[str, str | None]]] = []
    for i, item in enumerate(items):
        if not groups or not _goes_on(groups[-1][-1], item):
            groups.append([])
            named.append([])
        groups[-1].append(item)
        if isinstance(item, OutputItem) or (isinstance(item, CallItem) and item.status != "incomplete"):
            named[-1].append((f"input.{i - own}.call_id" if i >= own else "previous_response_id", item.call_id))
    ids = [CallIds(each, gives=isinstance(group[0], OutputItem)) for group, each in zip(groups, named, strict=True)]
    return [item for i in in_order(ids) for item in groups[i]]


def _goes_on(before: Item, item: Item) -> bool:
    """Whether an item belongs to the message that the one before it is in, as calls of the assistant's do."""
    by_assistant = isinstance(before, CallItem) or (isinstance(before, MessageItem) and before.role == "assistant")
    return isinstance(item, CallItem) and by_assistant


def dialogue(items: Sequence[Item], instructions: str | None) -> list[Message]:
    """Messages for the tokenizer. A call belongs to the assistant's message before it."""
    found: list[Message] = [] if instructions is None else [{"role": "system", "content": instructions}]
    calls: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, MessageItem):
            found.append({"role": "system" if item.role == "developer" else item.role, "content": item.text})
            calls = []
        elif isinstance(item, OutputItem):
            found.append({"role": "tool", "content": item.text})
        elif item.status != "incomplete":
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": ""})
                calls = []
            calls.append({"function": {"name": item.name, "arguments": item.arguments}})
            found[-1]["tool_calls"] = calls
    return found


def fit(
    items: Sequence[Item], encode: Callable[[Sequence[Item]], list[int]], limit: int, characters: int
) -> tuple[list[int], list[Item]]:
    """The prompt of a conversation, without its oldest turns where it would have more than `limit` ids; what went.

    A turn begins with what the user says and goes on until the user speaks again. System messages stay, and so does
    the last turn, even if the prompt is too long then. Turns that are more than so many `characters` together, or than
    items with a token each could be, are not even made into ids.
    """
    turns = _turns(items)
    length = sum(map(_length, items))
    unread = 0
    while length > characters and unread < len(turns) - 1:
        length -= sum(_length(items[i]) for i in turns[unread])
        unread += 1
    if length > characters:
        raise bad("input", "the last turn and the instructions are too long by far", "context_length_exceeded")

    def prompt(dropped: int) -> list[int]:
        gone = {i for turn in turns[:dropped] for i in turn}
        return encode([item for i, item in enumerate(items) if i not in gone])

    whole = prompt(unread)
    if len(whole) <= limit or unread >= len(turns) - 1:
        return whole, [items[i] for turn in turns[:unread] for i in turn]
    fewer = range(unread + 1, len(turns))
    dropped = fewer[min(bisect_left(fewer, True, key=lambda k: len(prompt(k)) <= limit), len(fewer) - 1)]
    return prompt(dropped), [items[i] for turn in turns[:dropped] for i in turn]


def _length(item: Item) -> int:
    """Characters, and those of the token that an item takes at least."""
    return _OF_A_TOKEN + len(item.arguments if isinstance(item, CallItem) else item.text)


def _turns(items: Sequence[Item]) -> list[list[int]]:
    """Numbers of the items of each turn, without those of system messages."""
    turns: list[list[int]] = []
    user_before = False
    for i, item in enumerate(items):
        if isinstance(item, MessageItem) and item.role in ("system", "developer"):
            continue
        user = isinstance(item, MessageItem) and item.role == "user"
        if not turns or (user and not user_before):
            turns.append([])
        turns[-1].append(i)
        user_before = user
    return turns
