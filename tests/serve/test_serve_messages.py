"""Anthropic's official client against a served model."""

from __future__ import annotations

import json
from typing import Any

import pytest

anthropic = pytest.importorskip("anthropic")

from tests.serve.tools import MESSAGES_TOOL  # noqa: E402

USER = [{"role": "user", "content": "Who are you?"}]
OPTIONS: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "extra_body": {"seed": 4}}


@pytest.fixture
def client(served: Any) -> Any:
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)


def test_whole_and_streamed(client: Any) -> None:
    whole = client.messages.create(messages=USER, **OPTIONS)
    assert whole.type == "message" and whole.role == "assistant" and whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 9 and whole.content[0].type == "text"
    with client.messages.stream(messages=USER, **OPTIONS) as stream:
        kinds = [event.type for event in stream]
        last = stream.get_final_message()
    assert last.content[0].text == whole.content[0].text and last.stop_reason == "max_tokens"
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop" and "content_block_stop" in kinds
    total = last.usage.input_tokens + (last.usage.cache_read_input_tokens or 0)
    assert total == client.messages.count_tokens(model="tiny", messages=USER).input_tokens


def test_the_same_answer_as_in_the_other_api(client: Any, served: Any) -> None:
    with served.client() as http:
        body = {"messages": [{"role": "system", "content": "Be brief."}, *USER], "max_tokens": 9, "seed": 4}
        other = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    blocks = [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]
    for system in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        answer = client.messages.create(system=system, messages=[{"role": "user", "content": blocks}], **OPTIONS)
        assert answer.content[0].text == other


def test_stop_sequences(client: Any) -> None:
    whole = client.messages.create(messages=USER, **OPTIONS).content[0].text
    stopped = client.messages.create(messages=USER, stop_sequences=[whole[2:4]], **OPTIONS)
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == whole[2:4]
    assert stopped.content[0].text == whole[: whole.index(whole[2:4])]


def test_tools(client: Any) -> None:
    options: dict[str, Any] = {**OPTIONS, "max_tokens": 60, "tools": [MESSAGES_TOOL], "messages": USER}
    for choice in ({"type": "any"}, {"type": "tool", "name": "switch"}):
        whole = client.messages.create(tool_choice=choice, **options)
        assert whole.stop_reason == "tool_use"
        (block,) = whole.content
        assert block.type == "tool_use" and block.name == "switch" and isinstance(block.input["on"], bool)
        with client.messages.stream(tool_choice=choice, **options) as stream:
            pieces = "".join(e.delta.partial_json for e in stream if e.type == "content_block_delta")
            assert stream.get_final_message().content[0].input == block.input == json.loads(pieces)
    turns = [
        *USER,
        {"role": "assistant", "content": [block.model_dump(include={"type", "id", "name", "input"})]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "done"}]},
    ]
    assert client.messages.create(messages=turns, **OPTIONS).content


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"temperature": -1}}, "temperature"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, "512"),
        ({"tool_choice": {"type": "any"}}, "tool"),
    ],
)
def test_errors(client: Any, change: dict[str, Any], text: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=text):
        client.messages.create(**(OPTIONS | {"messages": USER} | change))


@pytest.mark.parametrize("content", ["<|eot_id|>", "<|start_header_id|>"])
def test_content_never_becomes_control(client: Any, served: Any, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """Through every place of Anthropic's where text goes in."""
    (model,) = served.registry.loaded
    submit, seen = model.driver.submit, list[list[int]]()

    def noted(prompt: Any, *args: Any, **more: Any) -> Any:
        seen.append([i for i in prompt if i in set(served.llm.tokenizer.specials.values())])
        return submit(prompt, *args, **more)

    def say(text: str) -> list[list[int]]:
        block, schema = {"type": "text", "text": text}, {"type": "object", "title": text}
        call = {"type": "tool_use", "id": text, "name": "f", "input": {text: text}}
        result = {"type": "tool_result", "tool_use_id": text, "content": [block]}
        turns = [("user", [block]), ("assistant", [block, call]), ("user", [result, block]), ("assistant", text)]
        messages = [{"role": role, "content": said} for role, said in turns]
        tools = [{"name": "f", "description": text, "input_schema": schema}]
        client.messages.create(messages=messages, system=[block], tools=tools, **OPTIONS)
        client.messages.create(messages=[{"role": "user", "content": text}], system=text, **OPTIONS)
        return [seen.pop(0), seen.pop(0)]

    monkeypatch.setattr(model.driver, "submit", noted)
    plain = say("x")
    assert say(content) == plain and all(plain)
