"""Chat formats of every generation, by name."""

from __future__ import annotations

from collections.abc import Mapping

from herd.errors import UsageError
from herd.tokenizer.chat.calls import ArgumentsDelta, CallParser, CallStart, Delta, TextDelta, parse_calls
from herd.tokenizer.chat.headers import LLAMA3, LLAMA3_1, LLAMA3_2, LLAMA3_3, LLAMA4
from herd.tokenizer.chat.inst import CODE_LLAMA, LLAMA2
from herd.tokenizer.chat.messages import Call, ChatFormat, Encoded, Message, check_messages
from herd.tokenizer.chat.step import CODE_LLAMA_70B

__all__ = [
    "CHAT_FORMATS",
    "ArgumentsDelta",
    "Call",
    "CallParser",
    "CallStart",
    "ChatFormat",
    "Delta",
    "Encoded",
    "Message",
    "TextDelta",
    "check_messages",
    "choose_format",
    "parse_calls",
]

_ALL: tuple[ChatFormat, ...] = (LLAMA2, CODE_LLAMA, CODE_LLAMA_70B, LLAMA3, LLAMA3_1, LLAMA3_2, LLAMA3_3, LLAMA4)

# Llama 1 was released without a chat format; it is given that of Llama 2, which has the same vocabulary.
CHAT_FORMATS: dict[str, ChatFormat] = {"llama1": LLAMA2} | {chat.name: chat for chat in _ALL}


def choose_format(name: str | None, specials: Mapping[str, int]) -> ChatFormat:
    """The format of that name, or without one the newest that the vocabulary's control tokens allow.

    Vocabularies of 3.1, 3.2 and 3.3 are the same, so those that write tool calls in Python are only chosen by name.
    Raises `UsageError` for an unknown name and for a format whose control tokens the vocabulary lacks.
    """
    if name == "codellama" and "<step>" in specials:
        name = CODE_LLAMA_70B.name  # the same test as in Meta's code
    if name is not None and name not in CHAT_FORMATS:
        raise UsageError("unknown chat format", value=name, allowed=", ".join(CHAT_FORMATS))
    if name is None:
        guesses: tuple[ChatFormat, ...] = (LLAMA4, LLAMA3_1, CODE_LLAMA_70B, CODE_LLAMA, LLAMA2)
        marks = ("<|header_start|>", "<|eom_id|>", "<step>", "▁<PRE>", "<s>")
        chat = next((chat for chat, mark in zip(guesses, marks, strict=True) if mark in specials), LLAMA3)
    else:
        chat = CHAT_FORMATS[name]
    missing = [control for control in chat.controls if control not in specials]
    if missing:
        raise UsageError(
            f"the vocabulary cannot write the chat format {chat.name}",
            value=f"no token {', '.join(missing)}",
            allowed=", ".join(name for name, c in CHAT_FORMATS.items() if all(x in specials for x in c.controls))
            or None,
        )
    return chat
