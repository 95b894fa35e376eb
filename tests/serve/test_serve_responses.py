"""/v1/responses: the official client and its types are the oracle for what is sent, chat's answers for the text."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

pytest.importorskip("openai")

from tests.serve.response_checks import OPTIONS, ask, chat, same, seeded, text_of, told
from tests.serve.tools import RESPONSES_TOOL


def test_a_text(alice: Any) -> None:
    answer = ask(alice, input="Who are you?", **seeded())
    assert answer["status"] == "incomplete" and answer["incomplete_details"] == {"reason": "max_output_tokens"}
    (item,) = answer["output"]
    assert item["status"] == "incomplete" and item["role"] == "assistant" and answer["usage"]["output_tokens"] == 9
    expected = chat(alice, [{"role": "user", "content": "Who are you?"}])
    assert (text_of(answer), answer["usage"]["input_tokens"]) == expected
    assert answer["store"] is True and answer["temperature"] == 0.6 and answer["tools"] == []
    same(ask(alice, input="Who are you?", **seeded()), answer)
    cached = [ask(alice, input="once more " * 40, **seeded())["usage"]["input_tokens_details"] for _ in range(2)]
    assert cached[0]["cached_tokens"] < cached[1]["cached_tokens"]
    whole = ask(alice, input="Who are you?", **seeded(stop=text_of(answer)[3:5]))
    assert whole["status"] == "completed" and text_of(answer).startswith(text_of(whole))
    assert whole["output"][0]["status"] == "completed" and whole["completed_at"] >= whole["created_at"]


def test_what_is_said_is_repeated(alice: Any) -> None:
    given: dict[str, Any] = {
        "instructions": "Be brief.", "temperature": 0.25, "top_p": 0.5, "metadata": {"a": "b"}, "user": "u",
        "safety_identifier": "s", "prompt_cache_key": "k", "truncation": "disabled", "tools": [RESPONSES_TOOL],
        "tool_choice": {"type": "function", "name": "switch"}, "parallel_tool_calls": False,
        "service_tier": "default", "max_output_tokens": 40, "model": "tiny",
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
    }  # fmt: skip
    answer = ask(alice, input="x", **given)
    assert {name: answer[name] for name in given} == given
    assert ask(alice, input="x", background=False, **OPTIONS)["background"] is False


def test_items_and_instructions(alice: Any) -> None:
    """Every way to say the same, against chat."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A llama."},
        {"role": "user", "content": "More."},
    ]
    expected = chat(alice, messages)
    parts = [
        {"role": "developer",
         "content": [{"type": "input_text", "text": "Be "}, {"type": "input_text", "text": "brief."}]},
        {"type": "message", "role": "user", "content": "Who are you?", "status": None},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "phase": None,
         "content": [{"type": "output_text", "text": "A llama.", "annotations": [], "logprobs": []}]},
        {"role": "user", "content": [{"type": "input_text", "text": "More."}]},
    ]  # fmt: skip
    for body in (
        {"input": messages},
        {"input": parts},
        {"input": messages[1:], "instructions": "Be brief."},
    ):
        answer = ask(alice, **body, **seeded())  # type: ignore[arg-type]
        assert (text_of(answer), answer["usage"]["input_tokens"]) == expected


def test_a_stream(alice: Any, storing: Any) -> None:
    whole = ask(alice, input="Who are you?", **seeded())
    events, final = told(storing, input="Who are you?", **seeded())
    same(final, whole)
    assert len([each for each in events if each["type"] == "response.output_text.delta"]) > 1
    kept = alice.responses.with_raw_response.retrieve(final["id"]).http_response.content
    assert json.loads(kept) == final
    # The client puts the pieces together by itself.
    with alice.responses.stream(input="Who are you?", **OPTIONS | {"max_output_tokens": 60}) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    events = list(alice.responses.create(input="Who are you?", stream=True, **seeded()))
    assert events[-1].response.output_text == text_of(whole) and text


def test_logprobs(alice: Any, storing: Any) -> None:
    more: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 3}
    answer = ask(alice, input="Who are you?", **more, **seeded())
    messages = [{"role": "user", "content": "Who are you?"}]
    expected = alice.chat.completions.create(
        model="tiny", messages=messages, max_tokens=9, seed=4, logprobs=True, top_logprobs=3
    )
    found = answer["output"][0]["content"][0]["logprobs"]
    assert found == [token.to_dict() for token in expected.choices[0].logprobs.content] and len(found) == 9
    assert answer["top_logprobs"] == 3 and all(len(token["top_logprobs"]) == 3 for token in found)
    _, final = told(storing, input="Who are you?", **more, **seeded())
    same(final, answer)
    plain = ask(alice, input="Who are you?", include=more["include"], **seeded())
    assert [token["logprob"] for token in plain["output"][0]["content"][0]["logprobs"]] == [t["logprob"] for t in found]
    called = ask(
        alice, input="x", **more, tools=[RESPONSES_TOOL], tool_choice="required", model="tiny", extra_body={"seed": 1}
    )
    assert called["output"][0]["type"] == "function_call"


def test_structured_answers(alice: Any, storing: Any) -> None:
    class Light(pydantic.BaseModel):
        on: bool

    options: dict[str, Any] = {"input": "Is it on?", **seeded(5), "max_output_tokens": 200}
    parsed = alice.responses.parse(text_format=Light, **options)
    assert isinstance(parsed.output_parsed, Light) and parsed.status == "completed"
    with alice.responses.stream(text_format=Light, **options) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Light)
    answers = (ask(alice, text={"format": {"type": "json_object"}}, **{**options, **seeded(i)}) for i in range(20))
    finished = next(answer for answer in answers if answer["status"] == "completed")
    assert isinstance(json.loads(text_of(finished)), dict)
    plain = ask(alice, text={"format": {"type": "text"}}, input="Who are you?", **seeded())
    assert plain["text"] == ask(alice, input="Who are you?", **seeded())["text"]


def test_tools(alice: Any, storing: Any) -> None:
    options: dict[str, Any] = {"input": "Light!", "tools": [RESPONSES_TOOL], **seeded(1), "max_output_tokens": 60}
    for choice in ("required", {"type": "function", "name": "switch"}):
        answer = ask(alice, tool_choice=choice, **options)
        call = answer["output"][0]
        assert call["type"] == "function_call" and call["name"] == "switch" and call["status"] == "completed"
        assert isinstance(json.loads(call["arguments"])["on"], bool) and answer["tool_choice"] == choice
        if choice != "required":
            assert len(answer["output"]) == 1
        events, final = told(storing, tool_choice=choice, **options)
        same(final, answer)
        assert any(each["type"] == "response.function_call_arguments.delta" for each in events)
    none = ask(alice, tool_choice="none", **options)
    assert [item["type"] for item in none["output"]] == ["message"]
    without = ask(alice, **{**options, "tools": []})
    assert without["usage"]["input_tokens"] == none["usage"]["input_tokens"]
    auto = ask(alice, **options)
    assert auto["usage"]["input_tokens"] > none["usage"]["input_tokens"] and auto["tool_choice"] == "auto"
    with alice.responses.stream(tool_choice="required", **options) as stream:
        assert stream.get_final_response().output[0].type == "function_call"
