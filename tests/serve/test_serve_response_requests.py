"""What requests to /v1/responses may say, and how a conversation becomes a prompt."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

openai = pytest.importorskip("openai")

from openai.types.responses import response_create_params  # noqa: E402

from herd.serve.api.response_items import (  # noqa: E402
    CallItem,
    MessageItem,
    OutputItem,
    dialogue,
    fit,
    read_item,
    with_outputs,
)
from herd.serve.api.responses import ResponsesRequest  # noqa: E402

SWITCH = {"type": "function", "name": "switch", "parameters": {"type": "object"}}

ITEMS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "system", "developer", "call", "output"]), st.integers(0, 9)),
    max_size=14,
)


@given(ITEMS, st.integers(0, 60))
def test_what_is_dropped(made: list[tuple[str, int]], limit: int) -> None:
    """Against a search through all numbers of turns, which are told apart in another way."""
    items: list[Any] = []
    for role, size in made:
        if role == "call":
            items.append(CallItem(type="function_call", call_id="c", name="f", arguments="x" * size))
        elif role == "output":
            items.append(OutputItem(type="function_call_output", call_id="c", output="x" * size))
        else:
            items.append(MessageItem(role=role, content="x" * size))  # type: ignore[arg-type]

    def encode(kept: Any) -> list[int]:
        return [0] * sum(1 + len(getattr(item, "text", "") or getattr(item, "arguments", "")) for item in kept)

    def is_system(item: Any) -> bool:
        return getattr(item, "role", "") in ("system", "developer")

    said = [item for item in items if not is_system(item)]
    starts = [
        i
        for i, item in enumerate(said)
        if i and getattr(item, "role", "") == "user" and getattr(said[i - 1], "role", "") != "user"
    ]
    for start in [0, *starts]:
        expected = said[:start]
        kept = [item for item in items if not any(item is gone for gone in expected)]
        if len(encode(kept)) <= limit:
            break
    ids, dropped = fit(items, encode, limit, 1 << 62)
    assert [id(item) for item in dropped] == [id(item) for item in expected] and ids == encode(kept)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"input": 5}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": None}, "input", "invalid_value"),
        ({"input": ["x"]}, "input.0", "invalid_value"),
        ({"input": [{"role": "user"}]}, "input.0.content", "missing_parameter"),
        ({"input": [{"role": "me", "content": "x"}]}, "input.0.role", "invalid_value"),
        ({"input": [{"role": "user", "content": "x", "name": "y"}]}, "input.0.name", "unknown_parameter"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type", "unsupported_parameter"),
        ({"input": [{"type": ["message"], "id": "x"}]}, "input.0.type", "unsupported_parameter"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input.0.content.0.type", "unsupported_parameter"),
        ({"input": [{"role": "user", "content": [{"type": "output_text", "text": "x"}]}]},
         "input.0.content.0.type", "unsupported_parameter"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "namespace": "n"}]},
         "input.0.namespace", "unsupported_parameter"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]}, None, "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"include": ["reasoning.encrypted_content"]}, "include", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort", "invalid_value"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "unsupported_parameter"),
        ({"max_tool_calls": 1}, "max_tool_calls", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "unsupported_parameter"),
        ({"tools": ["x"]}, "tools.0", "invalid_value"),
        ({"tools": [SWITCH, SWITCH]}, "tools.1.name", "invalid_value"),
        ({"tools": [{**SWITCH, "defer_loading": True}]}, "tools.0.defer_loading", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "any"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type", "unsupported_parameter"),
        ({"tools": [SWITCH], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name", "invalid_value"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_parameter"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"$ref": "http://x/y"}}}}, None, None),
        ({"truncation": "middle"}, "truncation", "invalid_value"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", "invalid_value"),
        ({"previous_response_id": "resp_none"}, "previous_response_id", "previous_response_not_found"),
        ({"extra_body": {"max_tokens": 1}}, "max_tokens", "unsupported_parameter"),
        ({"extra_body": {"n": 2}}, "n", "unsupported_parameter"),
        ({"extra_body": {"instruction": "x"}}, "instruction", "unknown_parameter"),
    ],
)  # fmt: skip
def test_errors_name_the_field(served: Any, change: dict[str, Any], param: str | None, code: str | None) -> None:
    client = served.openai()
    for stream in ({}, {"stream": True}):  # before the first token an error is a status in a stream as well
        if stream and "stream_options" in change:
            continue
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**({"model": "tiny", "max_output_tokens": 2, "input": "x"} | change | stream))
        assert param is None or caught.value.param == param
        assert code is None or caught.value.code == code


def test_every_field_of_openai_is_there_or_refused_by_name() -> None:
    names = set(get_type_hints(response_create_params.ResponseCreateParamsBase)) | {"stream"}
    ours = set(ResponsesRequest.model_fields) | set(ResponsesRequest.UNSUPPORTED)
    assert names <= ours, names - ours
    assert not set(ResponsesRequest.UNSUPPORTED) & (set(ResponsesRequest.model_fields) - {"max_tokens", "n"})


def test_items_are_the_same_after_the_store() -> None:
    for item in (
        MessageItem(role="assistant", content="x"),
        MessageItem(role="user", content="y"),
        CallItem(type="function_call", call_id="c", name="f", arguments="{}"),
        OutputItem(type="function_call_output", call_id="c", output="z"),
    ):
        again = read_item(json.loads(json.dumps(item.stored())), "x")
        assert again.stored() == item.stored() and type(again) is type(item)
        assert dialogue([again], None) == dialogue([item], None)


def test_truncation(served: Any) -> None:
    """512 tokens of context. Whole turns go, the oldest first, and no more than must."""
    items: list[Any] = [{"role": "system", "content": "Be brief."}]
    for i in range(12):
        items += [
            {"role": "user", "content": f"Question {i}? " + "word " * 12, "id": f"msg_q{i}"},
            {"role": "assistant", "content": f"Answer {i}.", "id": f"msg_a{i}"},
        ]
    items.append({"role": "user", "content": "The last one."})
    client = served.openai()
    options: dict[str, Any] = {"model": "tiny", "max_output_tokens": 20, "extra_body": {"seed": 4}}
    with pytest.raises(openai.BadRequestError, match=r"512 tokens.* needs \d{3,4}.*truncation") as caught:
        client.responses.create(input=items, **options)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "input"
    answer = client.responses.create(input=items, truncation="auto", **options)
    dropped = answer.dropped_items
    turns = len(dropped) // 2
    assert 0 < turns < 12 and dropped == [
        {"id": f"msg_{who}{i}", "type": "message", "input_index": 1 + 2 * i + j}
        for i in range(turns)
        for j, who in enumerate("qa")
    ]
    left = [items[0], *items[1 + 2 * turns :]]
    expected = client.responses.create(input=left, **options)
    assert answer.usage.input_tokens == expected.usage.input_tokens <= 512 - 20
    assert answer.output_text == expected.output_text
    much = client.responses.create(input=items, truncation="auto", model="tiny", max_output_tokens=200)
    assert len(much.dropped_items) > len(dropped)  # room for the answer
    one_more = [items[0], *items[1 + 2 * (turns - 1) :]]
    with pytest.raises(openai.BadRequestError, match="context"):
        client.responses.create(input=one_more, **options)
    with pytest.raises(openai.BadRequestError, match="512"):  # the last turn stays
        client.responses.create(input="word " * 600, truncation="auto", **options)


def call(name: str, status: str = "completed") -> CallItem:
    return CallItem(type="function_call", call_id=name, name="f", arguments="{}", status=status)  # type: ignore[arg-type]


def output(name: str, text: str) -> OutputItem:
    return OutputItem(type="function_call_output", call_id=name, output=text)


def test_calls_and_what_they_gave() -> None:
    items: list[Any] = [
        MessageItem(role="user", content="u"), MessageItem(role="assistant", content="a"),
        call("1"), call("2"), call("3", "incomplete"), output("2", "two"), output("1", "one"),
        call("1"), output("1", "again"), MessageItem(role="assistant", content="b"),
    ]  # fmt: skip
    made = {"function": {"name": "f", "arguments": "{}"}}

    found = dialogue(with_outputs(items), None)
    assert all(each == made for message in found for each in message.get("tool_calls", ()))
    assert [(m["role"], m["content"], len(m.get("tool_calls", ()))) for m in found] == [
        ("user", "u", 0), ("assistant", "a", 2), ("tool", "one", 0), ("tool", "two", 0),
        ("assistant", "", 1), ("tool", "again", 0), ("assistant", "b", 0),
    ]  # fmt: skip
