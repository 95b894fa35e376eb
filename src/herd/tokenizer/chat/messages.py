"""Messages in, ids and a mask out: what all chat formats share.

The mask is made while the ids are: whoever writes a token knows whether it is the assistant's own. It is never found
by searching text, and content is always encoded as plain text, so that it cannot become a control token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypedDict

from herd.errors import UsageError
from herd.tokenizer.vocabulary import Vocabulary

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


class Message(TypedDict, total=False):
    """One message of a dialogue, as in OpenAI's API. `role` is always needed; `content` unless there are tool calls."""

    role: Role
    content: str | None
    tool_calls: Sequence[
        Mapping[str, Any]
    ]  # {"function": {"name": …, "arguments": JSON text or dict}} or without the wrapper
    tool_call_id: str  # accepted and not shown to the model: no Llama format has a place for it
    name: str  # likewise


class Encoded(NamedTuple):
    """A dialogue as ids, and for each id whether it is one the assistant had to produce (loss is taken there)."""

    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class Call:
    """A call of a tool by the assistant."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A checked message."""

    role: Role
    content: str
    calls: tuple[Call, ...] = ()


class ChatFormat(Protocol):
    """How one generation writes a dialogue."""

    @property
    def name(self) -> str:
        """As in `herd.tokenizer.CHAT_FORMATS`."""

    @property
    def controls(self) -> tuple[str, ...]:
        """Control tokens without which the format cannot be written."""

    @property
    def template(self) -> str:
        """The same format as a Jinja template, for other tools. Plain dialogues only: no tools."""

    def encode(
        self, vocabulary: Vocabulary, turns: list[Turn], tools: Sequence[object] | None, add_generation_prompt: bool
    ) -> Encoded:
        """Ids and mask of a dialogue."""


class DialogWriter:
    """Collects ids and mask."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._ids: list[int] = []
        self._supervised: list[bool] = []

    def control(self, name: str, supervised: bool = False) -> None:
        if name not in self._vocabulary.specials:
            raise UsageError("the vocabulary lacks a control token that this dialogue needs", value=name)
        self._add([self._vocabulary.specials[name]], supervised)

    def text(self, text: str, supervised: bool = False) -> None:
        """A text that stands by itself."""
        self._add(self._vocabulary.encode(text), supervised)

    def continuation(self, text: str, supervised: bool = False) -> None:
        """A text that goes on after the one before."""
        self._add(self._vocabulary.encode_continuation(text), supervised)

    def _add(self, ids: list[int], supervised: bool) -> None:
        self._ids += ids
        self._supervised += [supervised] * len(ids)

    def encoded(self) -> Encoded:
        return Encoded(self._ids, self._supervised)


def check_messages(messages: Sequence[Message]) -> list[Turn]:
    """Turn messages into checked turns. Raises `UsageError` naming the message and what is wrong with it."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UsageError(
            "a dialogue is a list of at least one message", value=messages, allowed='[{"role": "user", "content": "…"}]'
        )
    return [_turn(i, message) for i, message in enumerate(messages)]


def _turn(index: int, message: Message) -> Turn:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise UsageError(f"{where} is not a message", value=message, allowed='{"role": …, "content": …}')
    given: object = message.get("role")
    # "ipython" is what Llama 3.1 writes for a tool's answer
    role = next((role for role in ROLES if given == role or (given == "ipython" and role == "tool")), None)
    if role is None:
        raise UsageError(f"{where} has no known role", value=given, allowed=", ".join(ROLES))
    listed: object = message.get("tool_calls") or ()
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise UsageError(f"{where}.tool_calls is not a list", value=listed, allowed='[{"name": "f", "arguments": {…}}]')
    calls = tuple(_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(listed))
    if calls and role != "assistant":
        raise UsageError(f"{where}: only the assistant calls tools", value=role, allowed="assistant")
    content = message.get("content")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise UsageError(f"{where} has no text as content", value=content, allowed="a string")
    return Turn(role, content, calls)


def _call(where: str, call: Mapping[str, Any]) -> Call:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise UsageError(f"{where} names no function", value=call, allowed='{"name": "f", "arguments": {…}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:  # ValueError: broken JSON, or a number of thousands of digits
            raise UsageError(f"{where}.arguments is not JSON ({error})", value=arguments) from None
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise UsageError(f"{where}.arguments is not an object", value=arguments, allowed='{"name": value, …}')
    return Call(name, dict(arguments))
