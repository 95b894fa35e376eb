"""Several calls of one message: how each format writes them, that they are read again, and what is learnt from them."""

from __future__ import annotations

from typing import Any

import pytest

from herd.tokenizer import Message, Tokenizer, parse_calls

QUESTION: Message = {"role": "user", "content": "?"}
NAMES = ("f", "g", "h")


def made(*calls: tuple[str, dict[str, Any]], text: str = "") -> Message:
    listed = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return {"role": "assistant", "content": text, "tool_calls": listed}


def gave(text: str) -> Message:
    return {"role": "tool", "content": text}


CALLS = [(name, {"n": i}) for i, name in enumerate(NAMES)]


@pytest.mark.parametrize("tools", [None, [{"name": "f"}]])
def test_llama3_1_has_a_message_for_each(small_llama3: Tokenizer, tools: Any) -> None:
    """The same as where somebody wrote them one after the other, each with what it gave."""
    together = [QUESTION, made(*CALLS, text="So:"), gave("zero"), gave("one"), gave("two"), QUESTION]
    apart = [
        QUESTION,
        made(CALLS[0], text="So:"), gave("zero"), made(CALLS[1]), gave("one"), made(CALLS[2]), gave("two"),
        QUESTION,
    ]  # fmt: skip
    assert small_llama3.encode_dialog(together, tools) == small_llama3.encode_dialog(apart, tools)


def test_calls_that_gave_nothing(small_llama3: Tokenizer) -> None:
    one, two, three = (made(call) for call in CALLS)
    for given, expected in (
        ([made(*CALLS)], [one, two, three]),
        ([made(*CALLS), QUESTION], [one, two, three, QUESTION]),
        ([made(*CALLS), gave("zero"), QUESTION], [one, gave("zero"), two, three, QUESTION]),
        ([made(*CALLS), made(*CALLS[:2])], [one, two, three, one, two]),
    ):
        found = small_llama3.encode_dialog([QUESTION, *given])
        assert found == small_llama3.encode_dialog([QUESTION, *expected])


@pytest.mark.parametrize("name", ["llama3.2", "llama3.3", "llama4"])
def test_python_has_a_list_of_them(small_llama3: Tokenizer, small_llama4: Tokenizer, name: str) -> None:
    tokenizer = small_llama4 if name == "llama4" else small_llama3.with_chat_format(name)
    text = tokenizer.decode(tokenizer.encode_dialog([QUESTION, made(*CALLS), *map(gave, "012")]).ids)
    assert text.count("[f(n=0), g(n=1), h(n=2)]") == 1 and text.count("ipython") == 3


@pytest.mark.parametrize("name", ["llama3.1", "llama3.2", "llama4"])
@pytest.mark.parametrize(
    "calls",
    [
        [("f", {"a": "x", "größe": [1, None]}), ("g", {})],
        [("get-weather", {"city": "Rome"})],
        [("get-weather", {"city": "Rome"}), ("f", {"a-b": 1}), ("g", {"": True})],
        [("a.b", {"c": 1}), ("f", {"n": 2})],
    ],
)
def test_what_is_written_is_read_again(
    small_llama3: Tokenizer, small_llama4: Tokenizer, name: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    """Names that are none in Python too: calls of such functions are written as JSON."""
    tokenizer = small_llama4 if name == "llama4" else small_llama3.with_chat_format(name)
    ids, supervised = tokenizer.encode_dialog([QUESTION, made(*calls), *[gave("!") for _ in calls]])
    end = tokenizer.specials["<|eom|>" if name == "llama4" else "<|eot_id|>"]
    messages: list[list[int]] = [[]]
    for i in (i for i, own in zip(ids, supervised, strict=True) if own):  # what the assistant writes itself
        if i == end:
            messages.append([])
        else:
            messages[-1].append(i)
    found = []
    for message in messages[:-1]:
        content, read = parse_calls(tokenizer.decode(message), {call for call, _ in calls})
        assert content == ""
        found += [(call.name, call.arguments) for call in read]
    assert found == calls


def test_a_built_in_tool_stands_alone(small_llama3: Tokenizer) -> None:
    tokenizer = small_llama3.with_chat_format("llama3.2")
    search = ("brave_search", {"query": "x"})
    together = [QUESTION, made(search, CALLS[0]), gave("a"), gave("b")]
    apart = [QUESTION, made(search), gave("a"), made(CALLS[0]), gave("b")]
    assert tokenizer.encode_dialog(together) == tokenizer.encode_dialog(apart)
