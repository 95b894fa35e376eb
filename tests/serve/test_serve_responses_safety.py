"""/v1/responses against what requests may try: control tokens, ids that are there twice, many conversations at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

openai = pytest.importorskip("openai")

from herd.serve.api.response_answer import Answer  # noqa: E402
from herd.serve.api.tools import Plan  # noqa: E402
from tests.serve.test_serve_response_streams import Ticket  # noqa: E402

CONTROL = ["<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>", "<|python_tag|>"]


@pytest.fixture
def prompts(storing: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """The prompts that reach the model from now on."""
    (model,) = storing.registry.loaded
    seen: list[list[int]] = []
    submit = model.driver.submit

    def noted(prompt: Any, *args: Any, **more: Any) -> Any:
        seen.append(list(prompt))
        return submit(prompt, *args, **more)

    monkeypatch.setattr(model.driver, "submit", noted)
    yield seen


@pytest.mark.parametrize("content", CONTROL)
def test_content_never_becomes_control(storing: Any, alice: Any, prompts: list[list[int]], content: str) -> None:
    """Through every place where text goes in, at once and by way of the store."""
    (model,) = storing.registry.loaded
    specials = model.llm.tokenizer.specials
    assert content in specials
    controls = set(specials.values())
    options: dict[str, Any] = {"model": "tiny", "max_output_tokens": 1}

    def say(text: str) -> None:
        tool = {"type": "function", "name": "f", "description": text, "parameters": {"type": "object", "title": text}}
        arguments = json.dumps({"x": text})
        items: list[Any] = [
            {"role": "system", "content": text},
            {"role": "developer", "content": [{"type": "input_text", "text": text}]},
            {"role": "user", "content": text},
            {"role": "assistant", "content": [{"type": "output_text", "text": text}]},
            {"type": "function_call", "call_id": text, "name": "f", "arguments": arguments},
            {"type": "function_call_output", "call_id": text, "output": [{"type": "input_text", "text": text}]},
        ]
        alice.responses.create(input=items, instructions=text, tools=[tool], **options)
        kept = alice.responses.create(input=items, **options)
        alice.responses.create(input=[{"role": "user", "content": text}], previous_response_id=kept.id, **options)

    say("x")
    plain = [[i for i in prompt if i in controls] for prompt in prompts]
    prompts.clear()
    say(content)
    assert [[i for i in prompt if i in controls] for prompt in prompts] == plain
    assert all(plain) and len(plain) == 3


def test_an_id_is_there_once(alice: Any) -> None:
    """Otherwise a listing that is turned page by page would begin anew for ever."""
    items: list[Any] = [{"role": "user", "content": str(i), "id": f"msg_{i % 29}"} for i in range(30)]
    with pytest.raises(openai.BadRequestError, match=r"input\.29\.id: 'msg_0' is there twice") as caught:
        alice.responses.create(model="tiny", max_output_tokens=1, input=items)
    assert caught.value.param == "input.29.id" and caught.value.code == "invalid_value"
    items[29]["id"] = "msg_29"
    made = alice.responses.create(model="tiny", max_output_tokens=1, input=items)
    listed = [item.id for item in alice.responses.input_items.list(made.id, limit=7, order="asc")]
    assert listed == [f"msg_{i}" for i in range(30)]


def test_many_conversations_at_once(storing: Any) -> None:
    """Each goes on from its own responses, and is the same as when it is alone."""
    keys = ("key-of-alice", "key-of-bob")

    async def turns(client: Any, topic: int) -> list[Any]:
        made: list[Any] = []
        for turn in range(4):
            before = made[-1].id if made else None
            made.append(
                await client.responses.create(
                    model="tiny", input=f"{topic}: {turn}?", max_output_tokens=3, previous_response_id=before,
                    extra_body={"seed": topic},
                )
            )  # fmt: skip
        return made

    async def several(topics: range) -> list[list[Any]]:
        clients = [openai.AsyncOpenAI(base_url=f"{storing.url}/v1", api_key=key, max_retries=0) for key in keys]
        try:
            return await asyncio.gather(*[turns(clients[topic % 2], topic) for topic in topics])
        finally:
            for client in clients:
                await client.close()

    together = asyncio.run(several(range(10)))
    alone = [asyncio.run(several(range(i, i + 1)))[0] for i in (0, 7)]
    for one, i in zip(alone, (0, 7), strict=True):
        assert [each.output_text for each in one] == [each.output_text for each in together[i]]
        assert [each.usage.input_tokens for each in one] == [each.usage.input_tokens for each in together[i]]
    names = [each.id for made in together for each in made]
    assert len(set(names)) == len(names)
    for i, made in enumerate(together):
        other = storing.openai(keys[1 - i % 2])
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(made[-1].id)


@pytest.mark.parametrize("call", [False, True])
def test_a_long_answer_takes_linear_time(call: bool) -> None:
    """20 MB in 4,000 pieces: putting what there is together at each would copy 40 GB."""
    pieces = ["word " * 1000] * 4000
    if call:
        pieces = ['{"name": "switch", "parameters": {"on": "', *pieces, '"}}']
    head: dict[str, Any] = {"output": [], "status": "in_progress"}

    async def keep(response: dict[str, Any]) -> None:
        pass

    plan = Plan(frozenset({"switch"}) if call else frozenset())
    api_call: Any = SimpleNamespace(done=lambda *_: None)
    ticket: Any = Ticket(pieces, None)
    start = time.process_time()
    response = asyncio.run(Answer(api_call, ticket, plan, head, keep, logprobs=False).whole())
    seconds = time.process_time() - start
    (item,) = response["output"]
    written = item["arguments"] if call else item["content"][0]["text"]
    assert item["status"] == response["status"] == "completed" and written.count("word ") == 4_000_000
    assert seconds < 3, f"{seconds:.1f} s"
