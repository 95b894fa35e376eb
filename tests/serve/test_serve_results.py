"""Whose result is whose, which fields errors name in unions, and small things that clients send."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.serve.api.conversation import CallIds, in_order, prompt_ids
from herd.serve.errors import ApiError

USER: list[Any] = [{"role": "user", "content": "hi"}]
CHAT, TEXT, CLAUDE, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"


# --- whose result is whose --------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=6), st.randoms(use_true_random=False))
def test_the_order(made: list[tuple[int, bool]], random: Any) -> None:
    """Messages with so many calls, which gave something or not; results come in any order, after the message."""
    said: list[Any] = []  # ("calls", ids) or ("result", id)
    wanted: list[Any] = []
    late: list[Any] = []
    for number, (calls, gave) in enumerate(made):
        ids = [f"{number}.{k}" for k in range(calls)]
        results = [("result", each) for each in ids] if gave else []
        said.append(("calls", ids))
        wanted += [("calls", ids), *results]
        late += random.sample(results, len(results))
        now, late = late[: (cut := random.randint(0, len(late)))], late[cut:]
        said += now
    said += random.sample(late, len(late))
    rows = [
        CallIds([("x", what)], gives=True) if kind == "result" else CallIds([("x", each) for each in what])
        for kind, what in said
    ]
    assert [said[i] for i in in_order(rows)] == wanted


def _chat(*results: str | None, calls: tuple[str | None, ...] = ("a", "b")) -> list[Any]:
    made = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in calls]
    gave = [{"role": "tool", "tool_call_id": i, "content": str(i)} for i in results]
    return [*USER, {"role": "assistant", "tool_calls": made}, *gave]


def _claude(*results: str, calls: tuple[str, ...] = ("a", "b")) -> list[Any]:
    made = [{"type": "tool_use", "id": i, "name": "f", "input": {}} for i in calls]
    gave = [{"type": "tool_result", "tool_use_id": i, "content": i} for i in results]
    return [
        *USER,
        {"role": "assistant", "content": made},
        {"role": "user", "content": [*gave, {"type": "text", "text": "?"}]},
    ]


def _items(*results: str, calls: tuple[str, ...] = ("a", "b")) -> list[Any]:
    made = [{"type": "function_call", "call_id": i, "name": "f", "arguments": "{}"} for i in calls]
    return [*USER, *made, *({"type": "function_call_output", "call_id": i, "output": i} for i in results)]


@pytest.mark.parametrize(
    ("path", "said", "field"),
    [
        (CHAT, _chat("a", "c"), "messages.3.tool_call_id"),
        (CHAT, _chat("a", "a"), "messages.3.tool_call_id"),
        (CHAT, _chat("b"), "messages.1.tool_calls.0.id"),
        (CHAT, _chat(None, None), "messages.2.tool_call_id"),
        (CHAT, _chat(calls=("a", "a")), "messages.1.tool_calls.1.id"),
        (CHAT, [*USER, {"role": "tool", "tool_call_id": "a", "content": ""}], "messages.1.tool_call_id"),
        (CHAT, [*USER, {"role": "tool", "content": ""}], "messages.1.tool_call_id"),
        (CHAT, [{"role": "user", "content": "", "tool_call_id": "a"}], "messages.0.tool_call_id"),
        ("/tokenize", _chat("a", "c"), "messages.3.tool_call_id"),
        (CLAUDE, _claude("a", "c"), "messages.2.content.1.tool_use_id"),
        (CLAUDE, _claude("a", "a"), "messages.2.content.1.tool_use_id"),
        (CLAUDE, _claude("b"), "messages.1.content.0.id"),
        (CLAUDE, _claude(calls=("a", "a")), "messages.1.content.1.id"),
        (RESPONSES, _items("a", "c"), "input.4.call_id"),
        (RESPONSES, _items("a", "a"), "input.4.call_id"),
        (RESPONSES, _items("b"), "input.1.call_id"),
        (RESPONSES, _items(calls=("a", "a")), "input.2.call_id"),
    ],
)  # fmt: skip
def test_results_that_are_of_no_call(served: Any, path: str, said: list[Any], field: str) -> None:
    with served.client() as client:
        more = {CLAUDE: {"max_tokens": 2}}.get(path, {})
        answer = client.post(path, json={"input" if path == RESPONSES else "messages": said, **more})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field and field in answer.json()["error"]["message"], answer.text


def test_results_without_a_doubt(served: Any) -> None:
    """No ids where one call waits, the same ids in another turn, calls that never gave anything."""
    with served.client() as client:
        for said in (
            _chat(None, calls=("a",)),
            _chat(None, calls=(None,)),
            [*_chat("b", "a"), *_chat("a", "b")],
            [*_chat(), *_chat("a", "b")],
            [*_chat(), *USER],
        ):
            answer = client.post(CHAT, json={"messages": said, "max_tokens": 2})
            assert answer.status_code == 200, answer.text


# --- fields -----------------------------------------------------------------------------------------------------------

SCHEMA = {"name": "x", "schema": {}}
FUNCTION = {"type": "function", "function": {"name": "f"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [FUNCTION]}}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {**SCHEMA, "foo": 1}}},
         "response_format.json_schema.foo"),
        (CHAT, {"response_format": {"type": "grammar", "grammar": "x"}}, "response_format.type"),
        (CHAT, {"response_format": {}}, "response_format.type"),
        (CHAT, {"response_format": 5}, "response_format"),
        (CHAT, {"response_format": {"type": "lark", "lark": "x", "grammar": "x"}}, "response_format.lark"),
        (CHAT, {"tools": [FUNCTION], "tool_choice": ALLOWED}, "tool_choice.allowed_tools"),
        (CHAT, {"tools": [FUNCTION], "tool_choice": "any"}, "tool_choice"),
        (CHAT, {"tools": [FUNCTION], "tool_choice": {**FUNCTION, "function": {"name": "f", "str": 1}}},
         "tool_choice.function.str"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "foo": 1}]}]},
         "messages.0.content.0.foo"),
        (CHAT, {"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
        (CHAT, {"logit_bias": {"5": -100, "05": 100}}, "logit_bias"),
        (CHAT, {"logit_bias": {"٥": 1}}, "logit_bias"),
        (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
        (TEXT, {"prompt": {"a": 1}}, "prompt"),
        (TEXT, {"prompt": "x", "ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
        ("/v1/embeddings", {"input": [[1], [-1]]}, "input.1.0"),
        (CLAUDE, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "foo": 1}]}]},
         "messages.0.content.0.foo"),
        (CLAUDE, {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
         "messages.0.content.0.type"),
        (CLAUDE, {"system": [{"type": "text", "text": "x", "text_": 1}]}, "system.0.text_"),
        (RESPONSES, {"input": "x", "text": {"format": {"type": "json_schema", **SCHEMA, "foo": 1}}}, "text.format.foo"),
        (RESPONSES, {"input": "x", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        (RESPONSES, {"input": "x", "stream": True, "stream_options": {"include_usage": True}},
         "stream_options.include_usage"),
    ],
)  # fmt: skip
def test_fields_in_unions_have_their_names(served: Any, path: str, body: dict[str, Any], param: str) -> None:
    defaults = {CHAT: {"messages": USER}, CLAUDE: {"messages": USER, "max_tokens": 2}}.get(path, {})
    with served.client() as client:
        answer = client.post(path, json={**defaults, **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_what_a_format_cannot_say_has_a_name(make_model: Callable[..., Path]) -> None:
    from herd import tokenizer
    from herd.engine import LLM

    first = tokenizer.load(make_model()).with_chat_format("llama3")
    with LLM(make_model(small=first), threads=1) as llm:
        for messages, tools, field in (
            (USER, [FUNCTION], "tools"),
            ([*USER, {"role": "assistant", "tool_calls": [FUNCTION]}], None, "messages"),
        ):
            with pytest.raises(ApiError, match="llama3 knows no tool") as caught:
                prompt_ids(llm, messages, tools)
            assert caught.value.param == field
    old: Any = SimpleNamespace(tokenizer=SimpleNamespace(chat_format="llama2"))
    with pytest.raises(ApiError, match="llama2") as caught:
        prompt_ids(old, [*USER, {"role": "assistant", "content": "Sure"}], None, begun=True)
    assert caught.value.param == "messages"


def test_rows_of_a_model_that_are_no_tokens(serving: Any, make_model: Callable[..., Path]) -> None:
    """A model may have more rows than its tokenizer has tokens, as a multiple is faster: nothing can mean them."""
    from herd import tokenizer

    size = tokenizer.load(make_model()).vocab_size
    with serving({"padded": make_model(vocab_size=size + 8, talkative=True)}) as padded, padded.client() as client:
        assert padded.llm.config.vocab_size == size + 8
        for number, status in ((size - 1, 200), (size, 400), (size + 7, 400), (size + 8, 400)):
            for path, body, field in (
                (TEXT, {"prompt": "x", "max_tokens": 1, "logit_bias": {str(number): 1}}, "logit_bias"),
                (TEXT, {"prompt": "x", "max_tokens": 1, "stop_token_ids": [number]}, "stop_token_ids"),
                (TEXT, {"prompt": [1, number], "max_tokens": 1, "echo": True}, "prompt"),
                ("/v1/embeddings", {"input": [1, number]}, "input"),
                ("/detokenize", {"tokens": [1, number]}, "tokens"),
            ):
                answer = client.post(path, json=body)
                assert answer.status_code == status, (path, answer.text)
                assert status == 200 or answer.json()["error"]["param"] == field


# --- small things that clients send -----------------------------------------------------------------------------------


def test_what_asks_for_nothing_is_taken(served: Any) -> None:
    """Each is as if it were not there."""
    with served.client() as client:
        for path, body, more in (
            (CHAT, {"messages": USER, "max_tokens": 5}, {"reasoning_effort": "none"}),
            (CHAT, {"messages": USER, "max_tokens": 5}, {"messages": [{**USER[0], "name": "Bob"}]}),
            (CLAUDE, {"messages": USER, "max_tokens": 5}, {"thinking": {"type": "disabled"}}),
            (RESPONSES, {"input": "hi", "max_output_tokens": 5}, {"reasoning": {"effort": "none", "summary": None}}),
            (RESPONSES, {"input": "hi", "max_output_tokens": 5}, {"reasoning": {"effort": None}}),
        ):
            plain, given = (client.post(path, json={**body, "seed": 4, **each}).json() for each in ({}, more))
            for name in ("choices", "content", "output"):
                texts = [json.dumps(answer.get(name)) for answer in (plain, given)]
                if path == RESPONSES and name == "output":
                    texts = [answer["output"][0]["content"][0]["text"] for answer in (plain, given)]
                assert texts[0] == texts[1]


def test_a_form_without_a_schema_is_an_object(served: Any) -> None:
    """OpenAI's chat may leave the schema out."""
    form: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x"}}
    options: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 40, "temperature": 0}
    text = served.openai().chat.completions.create(response_format=form, **options).choices[0].message.content
    form["json_schema"]["schema"] = {"type": "object"}
    assert text == served.openai().chat.completions.create(response_format=form, **options).choices[0].message.content
    assert text.lstrip().startswith("{")


def test_models_as_anthropic_lists_them(served: Any) -> None:
    anthropic = pytest.importorskip("anthropic")
    before = datetime.datetime.now(datetime.UTC)
    client = anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)
    (listed,) = client.models.list().data
    for model in (listed, client.models.retrieve("tiny")):
        assert (model.id, model.type, model.display_name, model.lifecycle) == ("tiny", "model", "tiny", "active")
        assert before - datetime.timedelta(hours=1) < model.created_at <= before
    assert served.openai().models.retrieve("tiny").created == int(listed.created_at.timestamp())
