"""Strict functions over HTTP, in all three APIs: a model that wants a wrong call cannot make it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "maxLength": 9}},
}
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
PATHS = (CHAT, RESPONSES, MESSAGES)
WRONG = '{"name": "weather", "parameters": {"city": 5, "bad": 1}}'
ENDS = {'"': 6.0, "}": 5.0, "]": 4.0, ")": 3.0, "C": 2.0}


@pytest.fixture(scope="module")
def server(serving: Any, make_model: Any) -> Iterator[Any]:
    with serving({"tiny": make_model(talkative=True, context_length=2048)}) as found:
        yield found


@contextlib.contextmanager
def wanting(served: Any, script: str) -> Iterator[None]:
    """The model wants to write this, then to end; where it may not, it ends what it has begun."""
    llm = served.registry.loaded[0].llm
    vocabulary = llm.tokenizer.vocab_size
    ends = [(i, ENDS[text]) for i in range(vocabulary) if (text := llm.tokenizer.decode([i])) in ENDS]
    wanted, stops, step = iter(llm.tokenizer.encode(script)), sorted(llm.tokenizer.stop_ids), llm.backend.step

    def forced(spans: Any) -> Any:
        logits = step(spans)
        if len(logits):
            logits[:] = 0.0
            for i, value in ends:
                logits[:, i] = value
            logits[:, stops] = 9.0
            if (token := next(wanted, None)) is not None:
                logits[:, stops], logits[:, token] = -50.0, 50.0
        return np.ascontiguousarray(logits)

    llm.backend.step = forced
    try:
        yield
    finally:
        del llm.backend.step


def request(path: str, strict: bool | None, schema: Any = SCHEMA, **more: Any) -> dict[str, Any]:
    """A request with the function `weather`, after one that is not strict."""
    words = [{"role": "user", "content": "hi"}]
    both: list[dict[str, Any]] = [{"name": "note"}, {"name": "weather", "strict": strict}]
    schemas = [{"type": "object"}, schema]
    if path == MESSAGES:
        tools = [{**tool, "input_schema": found} for tool, found in zip(both, schemas, strict=True)]
        return {"messages": words, "max_tokens": 100, "temperature": 0, "tools": tools, **more}
    given = [{**tool, "parameters": found} for tool, found in zip(both, schemas, strict=True)]
    if path == RESPONSES:
        tools = [{"type": "function", **tool} for tool in given]
        return {"input": "hi", "max_output_tokens": 100, "temperature": 0, "tools": tools, **more}
    tools = [{"type": "function", "function": tool} for tool in given]
    return {"messages": words, "max_tokens": 100, "temperature": 0, "tools": tools, **more}


def answer(path: str, found: dict[str, Any]) -> tuple[str, list[tuple[str, Any]]]:
    """The text of an answer, and its calls."""
    if path == CHAT:
        message = found["choices"][0]["message"]
        calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", ())]
        return message["content"] or "", calls
    items = found["output"] if path == RESPONSES else found["content"]
    calls = [(c["name"], json.loads(c["arguments"])) for c in items if c["type"] == "function_call"]
    calls += [(c["name"], c["input"]) for c in items if c["type"] == "tool_use"]
    texts = [part["text"] for item in items if item["type"] == "message" for part in item["content"]]
    return "".join([*texts, *(item["text"] for item in items if item["type"] == "text")]), calls


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("script", [WRONG, "[weather(city=5)]", "<function=weather>{}</function>", f"[{WRONG}]"])
def test_a_wrong_call_is_not_made(server: Any, path: str, script: str) -> None:
    with server.client() as client, wanting(server, script):
        _, calls = answer(path, client.post(path, json=request(path, strict=True)).json())
    assert [name for name, _ in calls] == ["weather"]
    jsonschema.validate(calls[0][1], SCHEMA)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("strict", [False, None])
def test_without_strict_it_is_the_models_word(server: Any, path: str, strict: bool | None) -> None:
    with server.client() as client, wanting(server, WRONG):
        _, calls = answer(path, client.post(path, json=request(path, strict)).json())
    assert calls == [("weather", {"city": 5, "bad": 1})]


@pytest.mark.parametrize("path", PATHS)
def test_text_is_text(server: Any, path: str) -> None:
    """Also with something in it that would be a call elsewhere; and a function that is not strict stays free."""
    script = f"Sure.\n{WRONG} <function=weather>{{}}"
    with server.client() as client, wanting(server, script):
        assert answer(path, client.post(path, json=request(path, strict=True)).json()) == (script, [])
    free = '{"name": "note", "parameters": {"city": 5}}'
    with server.client() as client, wanting(server, free):
        assert answer(path, client.post(path, json=request(path, strict=True)).json()) == ("", [("note", {"city": 5})])


def test_a_stream(server: Any) -> None:
    with server.client() as client, wanting(server, WRONG):
        text = client.post(CHAT, json=request(CHAT, strict=True, stream=True)).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "weather"
    jsonschema.validate(json.loads("".join(call["function"]["arguments"] for call in calls)), SCHEMA)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("path", "param"),
    [(CHAT, "tools.1.function.parameters"), (RESPONSES, "tools.1.parameters"), (MESSAGES, "tools.1.input_schema")],
)
def test_a_schema_that_cannot_be_held_to(server: Any, path: str, param: str) -> None:
    unheld = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    patterns = [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}c"} for i in range(10, 30)]
    huge = {"type": "object", "properties": {"a": {"allOf": patterns}}}
    never = {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}
    with server.client() as client:
        for choice in ({}, {"tool_choice": {"type": "any"} if path == MESSAGES else "required"}):
            refused = client.post(path, json=request(path, True, unheld, **choice))
            assert refused.status_code == 400 and refused.json()["error"]["param"] == param
            assert "not" in refused.json()["error"]["message"]
        for found in (huge, never):
            refused = client.post(path, json=request(path, True, found))
            assert refused.status_code == 400 and refused.json()["error"]["param"] in ("tools", param)
        assert client.post(path, json=request(path, False, unheld)).status_code == 200  # nothing is held to it
        many = {"type": "object", "properties": {"x" * 100 + str(i): {"type": "string"} for i in range(900)}}
        refused = client.post(path, json=request(path, True, many))
        assert refused.status_code == 400 and refused.json()["error"]["param"].startswith("tools")


def test_a_format_of_texts_beside_strict_functions(server: Any) -> None:
    """Nothing is ignored: where both cannot be held to, it is said."""
    formats: dict[str, dict[str, Any]] = {
        CHAT: {"response_format": {"type": "json_object"}},
        RESPONSES: {"text": {"format": {"type": "json_object"}}},
    }
    with server.client() as client:
        for path, wanted in formats.items():
            refused = client.post(path, json=request(path, True, **wanted))
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == ("response_format" if path == CHAT else "text.format")
            assert client.post(path, json=request(path, False, **wanted)).status_code == 200
            for choice in ("none", "required"):
                assert client.post(path, json=request(path, True, tool_choice=choice, **wanted)).status_code == 200


def test_asked_for_calls_follow_references(server: Any) -> None:
    """`required` and a name hold all functions to their schemas, strict or not, one call or several."""
    for more in ({}, {"parallel_tool_calls": True}):
        with server.client() as client, wanting(server, WRONG):
            body = request(CHAT, None, tool_choice="required", **more)
            _, calls = answer(CHAT, client.post(CHAT, json=body).json())
        assert calls and calls[0][0] == "weather"
        jsonschema.validate(calls[0][1], SCHEMA)
