"""Every 400 names the field at fault as the request has it, and says what that field may be; nothing is ignored."""

from __future__ import annotations

from typing import Any

import pytest

SAID = [{"role": "user", "content": "hi"}]
CHAT, TEXT, ANTHROPIC = "/v1/chat/completions", "/v1/completions", "/v1/messages"
RESPONSES = "/v1/responses"
TOOL = {"name": "f", "input_schema": {"type": "object"}}
FUNCTION = {"type": "function", "function": {"name": "f"}}
UNHELD = {"name": "x", "schema": {"type": "object", "not": {}}}


def _replayed(arguments: str) -> list[dict[str, Any]]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [*SAID, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "1"}]


def _result(identity: str) -> list[dict[str, Any]]:
    use = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": identity, "content": "1"}
    return [*SAID, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    # unions: what is told is about the member that was meant
    (TEXT, {"prompt": []}, "prompt", "at least 1"),
    (TEXT, {"prompt": ["x"] * 257}, "prompt", "at most 256"),
    (TEXT, {"prompt": [1, -5]}, "prompt.1", "greater than or equal to 0"),
    (TEXT, {"prompt": [1, 2.5]}, "prompt.1", "integer"),
    (TEXT, {"prompt": True}, "prompt", ""),
    (CHAT, {"messages": SAID, "stop": ["x"] * 17}, "stop", "stop: allowed is a length of at most 16; got 17"),
    (CHAT, {"messages": SAID, "stop": "x" * 300}, "stop", "at most 256"),
    ("/v1/embeddings", {"input": ["x"] * 2049}, "input", "at most 2048"),
    (ANTHROPIC, {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "messages.0.content.0.text", "missing"),
    (ANTHROPIC, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
     "messages.0.content.0.text", "string"),
    (ANTHROPIC, {"messages": SAID, "thinking": {"type": "enabled", "budget_tokens": 1024}},
     "thinking.type", "'disabled'"),
    # values as the request has them
    (CHAT, {"messages": SAID, "store": True}, "store", "allowed is false; got true"),
    (ANTHROPIC, {"messages": SAID, "thinking": {"type": "disabled", "budget_tokens": 5}},
     "thinking.budget_tokens", "allowed is null; got 5"),
    # names as the request has them
    (CHAT, {"messages": SAID, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}},
     "response_format.json_schema.schema", ""),
    (CHAT, {"messages": SAID, "tools": [FUNCTION, FUNCTION]}, "tools.1.function.name", "twice"),
    (RESPONSES, {"input": "hi", "tools": [{"type": "function", "name": "f", "parameters": {}}] * 2},
     "tools.1.name", "twice"),
    (ANTHROPIC, {"messages": SAID, "tools": [TOOL, TOOL]}, "tools.1.name", "twice"),
    (ANTHROPIC, {"messages": SAID, "tools": [TOOL, {"type": "web_search_20250305", "name": "web_search"}]},
     "tools.1.type", "'web_search_20250305' is not supported; allowed is 'custom'"),
    (ANTHROPIC, {"messages": SAID, "tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}},
     "tool_choice.name", "not among"),
    (CHAT, {"messages": SAID, "logit_bias": {"99999999": 1}}, "logit_bias", "none of the model's"),
    (CHAT, {"messages": _replayed("{")}, "messages.1.tool_calls.0.function.arguments", "no JSON object"),
    (CHAT, {"messages": _replayed("[]")}, "messages.1.tool_calls.0.function.arguments", "no JSON object"),
    ("/detokenize", {"tokens": [1, 99999999]}, "tokens", "none of the model's"),
    # what an answer is held to
    (CHAT, {"messages": SAID, "response_format": {"type": "json_schema", "json_schema": UNHELD}},
     "response_format.json_schema.schema", "not followed; got not"),
    (TEXT, {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": UNHELD}},
     "response_format.json_schema.schema", "not followed; got not"),
    (RESPONSES, {"input": "x", "text": {"format": {"type": "json_schema", **UNHELD}}},
     "text.format.schema", "not followed; got not"),
    (ANTHROPIC, {"messages": SAID, "output_config": {"format": {"type": "json_schema", "schema": UNHELD["schema"]}}},
     "output_config.format.schema", "not followed; got not"),
    (CHAT, {"messages": SAID, "response_format": {"type": "lark", "grammar": "start: %json {"}},
     "response_format.grammar", "no JSON schema"),
    (TEXT, {"prompt": "x", "response_format": {"type": "regex", "grammar": "("}}, "response_format.grammar", ""),
    # the words are those of JSON
    (CHAT, {"messages": SAID, "max_tokens": "many"}, "max_tokens", 'allowed is an integer; got "many"'),
    (CHAT, {"messages": SAID, "stream": "x" * 90}, "stream", "allowed is true or false; got \"" + "x" * 40 + "\"…"),
    (CHAT, {"messages": [5]}, "messages.0", "allowed is an object; got 5"),
    (CHAT, {"messages": SAID, "response_format": 5}, "response_format", "allowed is an object; got 5"),
    (CHAT, {"messages": SAID, "logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias",
     "allowed is a length of at most 1024; got 1025"),
    (CHAT, {"messages": SAID, "user": "x" * 513}, "user", "allowed is a length of at most 512; got 513"),
    (CHAT, {"messages": SAID, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name",
     'allowed is a string that matches ^[A-Za-z0-9_.\\-]+$; got "a b"'),
    # nothing is ignored
    (TEXT, {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    (TEXT, {"prompt": "x", "stop_token_ids": [99999999]}, "stop_token_ids", "none of the model's"),
    (ANTHROPIC, {"messages": SAID, "tools": [TOOL], "tool_choice": {"type": "auto", "name": "f"}},
     "tool_choice.name", "is for a tool"),
    (ANTHROPIC, {"messages": _result("b")}, "messages.2.content.0.tool_use_id", "no call"),
    (CHAT + "?verbose=1", {"messages": SAID}, "verbose", "no query"),
]  # fmt: skip


@pytest.mark.parametrize("path, body, param, said", BAD, ids=[f"{path} {param}" for path, _, param, _ in BAD])
def test_the_field_is_named(served: Any, path: str, body: dict[str, Any], param: str, said: str) -> None:
    more = {"max_tokens": 3} if path == ANTHROPIC else {}
    with served.client() as client:
        answer = client.post(path, json={**body, **more})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert said in error["message"], error
    if path != ANTHROPIC:  # whose errors have no field of their own for it
        assert error["param"] == param, error
    assert param in error["message"], error


def test_what_clients_say_is_taken(served: Any) -> None:
    with served.client() as client:
        for path, body in (
            (CHAT, {"messages": _replayed("{}"), "max_tokens": 2}),
            (ANTHROPIC, {"messages": _result("a"), "max_tokens": 2}),
            (ANTHROPIC + "?beta=true", {"messages": SAID, "max_tokens": 2}),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
