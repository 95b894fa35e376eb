"""/v1/responses over several turns: calls and what they gave, earlier responses, and what there is no room for."""

from __future__ import annotations

from typing import Any

import pytest

openai = pytest.importorskip("openai")

from tests.serve.response_checks import OPTIONS, ask, chat, seeded, text_of  # noqa: E402
from tests.serve.tools import RESPONSES_TOOL, STRICT_CHAT_TOOL  # noqa: E402


def test_a_tool_answers(alice: Any) -> None:
    """The round trip, with what the client sends back by itself, with the store, and with chat."""
    options: dict[str, Any] = {"tools": [RESPONSES_TOOL]}
    first = alice.responses.create(
        input="Light!",
        tool_choice={"type": "function", "name": "switch"},
        max_output_tokens=60,
        model="tiny",
        **options,
    )
    (call,) = first.output
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "It is on."}
    items: list[Any] = [{"role": "user", "content": "Light!"}, *first.output, output]
    again = ask(alice, input=items, **options, **seeded())
    stored = ask(alice, input=[output], previous_response_id=first.id, **options, **seeded())
    in_parts = {**output, "output": [{"type": "input_text", "text": "It is"}, {"type": "input_text", "text": " on."}]}
    parts = ask(alice, input=[in_parts], previous_response_id=first.id, **options, **seeded())
    messages = [
        {"role": "user", "content": "Light!"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "It is on."},
    ]  # fmt: skip
    expected = chat(alice, messages, tools=[STRICT_CHAT_TOOL])
    for answer in (again, stored, parts):
        assert (text_of(answer), answer["usage"]["input_tokens"]) == expected
    with pytest.raises(openai.BadRequestError, match="no call waits"):
        alice.responses.create(model="tiny", input=[output], **options)
    with pytest.raises(openai.BadRequestError, match="no call waits"):
        alice.responses.create(model="tiny", input=[output, output], previous_response_id=first.id, **options)


def test_several_calls_and_their_answers(alice: Any) -> None:
    """Llama 3.1 has one call in a message: each then stands before what it gave."""
    options: dict[str, Any] = {"tools": [RESPONSES_TOOL]}
    for seed in range(200):
        first = ask(
            alice, input="Light!", tool_choice="required", parallel_tool_calls=True, **options,
            **{**seeded(seed, temperature=2), "max_output_tokens": 150},
        )  # fmt: skip
        calls = first["output"]
        if (
            len(calls) > 1 and first["status"] == "completed" and first["usage"]["output_tokens"] < 80
        ):  # and all has room
            break
    else:
        pytest.fail("never two calls")
    outputs = [{"type": "function_call_output", "call_id": c["call_id"], "output": f"{i}"} for i, c in enumerate(calls)]
    answer = ask(alice, input=outputs[::-1], previous_response_id=first["id"], **options, **seeded())
    listed = [item for pair in zip(calls, outputs, strict=True) for item in pair]
    apart = ask(alice, input=[{"role": "user", "content": "Light!"}, *listed], **options, **seeded())
    assert text_of(answer) == text_of(apart) and answer["usage"]["input_tokens"] == apart["usage"]["input_tokens"]


def test_a_conversation_goes_on(alice: Any) -> None:
    first = ask(alice, input="Who are you?", instructions="Shout.", **seeded())
    second = ask(alice, input="And then?", previous_response_id=first["id"], **seeded())
    third = ask(alice, input=[{"role": "user", "content": "Why?"}], instructions="Whisper.",
                previous_response_id=second["id"], **seeded())  # fmt: skip
    messages = [
        {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": text_of(first)},
        {"role": "user", "content": "And then?"}, {"role": "assistant", "content": text_of(second)},
        {"role": "user", "content": "Why?"},
    ]  # fmt: skip
    assert (text_of(second), second["usage"]["input_tokens"]) == chat(alice, messages[:3])  # nothing is shouted
    expected = chat(alice, [{"role": "system", "content": "Whisper."}, *messages])
    assert (text_of(third), third["usage"]["input_tokens"]) == expected
    assert third["previous_response_id"] == second["id"]
    # Another way from the same place.
    other = ask(alice, input="Where?", previous_response_id=first["id"], **seeded())
    expected = chat(alice, [*messages[:2], {"role": "user", "content": "Where?"}])
    assert (text_of(other), other["usage"]["input_tokens"]) == expected
    alice.responses.delete(first["id"])
    for name in (first["id"], second["id"]):
        with pytest.raises(openai.BadRequestError, match=first["id"]) as caught:
            alice.responses.create(input="x", previous_response_id=name, **OPTIONS)
        assert caught.value.code == "previous_response_not_found"
    assert alice.responses.retrieve(second["id"]).output_text == text_of(second)


def test_a_call_that_broke_off_is_not_repeated(alice: Any) -> None:
    options: dict[str, Any] = {"input": "Light!", "tools": [RESPONSES_TOOL], "tool_choice": "required"}
    cuts = (ask(alice, **options, **{**seeded(1), "max_output_tokens": n}) for n in range(14, 60))
    cut = next(cut for cut in cuts if cut["output"][0]["type"] == "function_call")
    assert cut["status"] == "incomplete" and cut["output"][0]["status"] == "incomplete"
    answer = ask(alice, input="Go on.", previous_response_id=cut["id"], tools=[RESPONSES_TOOL], **seeded())
    messages = [{"role": "user", "content": text} for text in ("Light!", "Go on.")]
    assert (text_of(answer), answer["usage"]["input_tokens"]) == chat(alice, messages, tools=[STRICT_CHAT_TOOL])


def test_what_was_said_earlier_goes_where_there_is_no_room(alice: Any) -> None:
    first = ask(alice, input="Once " * 90, **seeded())
    second = ask(alice, input="Twice.", previous_response_id=first["id"], **seeded())
    third = ask(alice, input="word " * 30, previous_response_id=second["id"], truncation="auto", **seeded())
    assert [item["type"] for item in third["dropped_items"]] == ["message"] * 2
    assert all(item["input_index"] is None for item in third["dropped_items"])
    assert third["dropped_items"][1]["id"] == first["output"][0]["id"]
    messages = [
        {"role": "user", "content": "Twice."}, {"role": "assistant", "content": text_of(second)},
        {"role": "user", "content": "word " * 30},
    ]  # fmt: skip
    assert (text_of(third), third["usage"]["input_tokens"]) == chat(alice, messages)
    assert ask(alice, input="Hi.", truncation="auto", **OPTIONS)["dropped_items"] == []
