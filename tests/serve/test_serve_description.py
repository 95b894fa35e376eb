"""The server's description of itself is held to what it answers; jsonschema is the judge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema

from herd.serve.app import ROUTES
from tests.serve.tools import CHAT_TOOL, MESSAGES_TOOL, RESPONSES_TOOL

CHAT, TEXT, RESPONSES, ANTHROPIC = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
USER = [{"role": "user", "content": "Who are you?"}]
CALL = {"type": "function_call", "call_id": "c1", "name": "switch", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "done"}]}
LONG = [{"role": role, "content": "word " * 20} for _ in range(20) for role in ("user", "assistant")]
POSTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": USER, "max_tokens": 5, "logprobs": True, "top_logprobs": 2, "n": 2}),
    (CHAT, {"messages": USER, "tools": [CHAT_TOOL], "tool_choice": "required"}),
    (TEXT, {"prompt": ["a", "b"], "max_tokens": 3, "echo": True, "logprobs": 2}),
    (TEXT, {"prompt": "a", "max_tokens": 3}),
    (RESPONSES, {"input": "x", "max_output_tokens": 3, "include": ["message.output_text.logprobs"], "top_logprobs": 2}),
    (RESPONSES, {"input": "x", "tools": [RESPONSES_TOOL], "tool_choice": "required"}),
    (RESPONSES, {"input": [*LONG, *USER], "truncation": "auto", "max_output_tokens": 3, "metadata": {"a": "b"}}),
    (RESPONSES, {"input": [*USER, {"role": "assistant", "content": "x"}, CALL, RESULT], "max_output_tokens": 3}),
    (ANTHROPIC, {"messages": USER, "max_tokens": 5}),
    (ANTHROPIC, {"messages": USER, "max_tokens": 150, "tools": [MESSAGES_TOOL], "tool_choice": {"type": "any"}}),
    ("/v1/messages/count_tokens", {"messages": USER}),
    ("/v1/embeddings", {"input": ["a", "b"]}),
    ("/v1/embeddings", {"input": "a", "encoding_format": "base64"}),
    ("/tokenize", {"content": "hi"}),
    ("/tokenize", {"content": "hi", "with_pieces": True}),
    ("/detokenize", {"tokens": [5, 6]}),
]
STREAMS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": USER}),
    (TEXT, {"prompt": "a"}),
    (RESPONSES, {"input": "x"}),
    (ANTHROPIC, {"messages": USER, "max_tokens": 5}),
]
NOT_MET = {"Error", "Failure"}  # of the types that answers have


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All that lie in each other."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(inner)


def _named(schema: Any) -> set[str]:
    """The types that a schema names."""
    return {each["$ref"].rpartition("/")[2] for each in _objects(schema) if "$ref" in each}


def test_answers_are_as_described(storing: Any) -> None:
    with storing.client(headers={"authorization": "Bearer key-of-alice"}) as http:
        description = http.get("/openapi.json").json()
        components = description["components"]["schemas"]
        answers: list[Any] = []
        called: set[tuple[str, str]] = set()

        def valid(name: str, value: Any) -> bool:
            schema = {"$ref": f"#/components/schemas/{name}", "components": description["components"]}
            return bool(jsonschema.Draft202012Validator(schema).is_valid(value))

        def ask(method: str, path: str, given: str = "", **more: Any) -> Any:
            answer = http.request(method, path.replace("{id}", given).replace("{name}", given), **more)
            assert answer.status_code == 200, answer.text
            content = description["paths"][path][method.lower()]["responses"]["200"]["content"]
            kind = answer.headers["content-type"].partition(";")[0]
            assert kind in content
            called.add((method, path))
            if "schema" not in content[kind]:
                return None
            (name,) = _named(content[kind])
            assert valid(name, answer.json()), (name, answer.json())
            answers.append(answer.json())
            return answer.json()

        for path in ("/", "/health", "/ready", "/metrics", "/openapi.json", "/v1/models"):
            ask("GET", path)
        ask("GET", "/v1/models/{name}", "tiny")
        for path, body in POSTS:
            given = ask("POST", path, json=body)
            if path == RESPONSES:
                for place in ("/v1/responses/{id}", "/v1/responses/{id}/input_items"):
                    ask("GET", place, given["id"])
                ask("DELETE", "/v1/responses/{id}", given["id"])
        for path, body in STREAMS:
            ask("POST", path, json={**body, "stream": True})
        assert called == {(method, path.replace(":path", "")) for method, path, _ in ROUTES}

        # Nothing is described that never comes.
        left = set.union(
            *(_named(of["responses"]["200"]) for each in description["paths"].values() for of in each.values())
        )
        types: set[str] = set()
        while left:
            types |= left
            left = set.union(*(_named(components[name]) for name in left)) - types
        met = {name for name in types for each in _objects(answers) if valid(name, each)}
        assert met == types - NOT_MET


def test_what_is_not_there_is_not_described(served: Any) -> None:
    with served.client() as http:
        fields = http.get("/openapi.json").json()["components"]["schemas"]["ResponsesRequest"]["properties"]
        for name in ("max_tokens", "n"):
            error = http.post(RESPONSES, json={"input": "x", name: 1}).json()["error"]
            assert name not in fields and error["code"] == "unsupported_parameter"
