"""/v1/responses: the official client and its types are the oracle for what is sent, chat's answers for the text."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydantic
import pytest

openai = pytest.importorskip("openai")

from openai.types.responses import Response, ResponseStreamEvent  # noqa: E402

from herd.errors import ResourceError  # noqa: E402
from herd.serve import Keys, ServeConfig  # noqa: E402
from herd.serve.api.response_answer import Answer  # noqa: E402
from herd.serve.api.tools import Plan  # noqa: E402
from herd.serve.errors import ApiError  # noqa: E402

EVENT = pydantic.TypeAdapter(ResponseStreamEvent)
OURS = {"store", "dropped_items"}  # fields that the client's types do not have
SWITCH = {
    "type": "function",
    "name": "switch",
    "description": "Turn the light on or off.",
    "parameters": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
    "strict": True,
}
OPTIONS: dict[str, Any] = {"model": "tiny", "max_output_tokens": 9}


def seeded(seed: int = 4, **more: Any) -> dict[str, Any]:
    return {**OPTIONS, "extra_body": {"seed": seed, **more}}


@pytest.fixture(scope="module")
def storing(serving: Any, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server that keeps responses, for two keys."""
    config = ServeConfig(port=0, store=tmp_path_factory.mktemp("store") / "responses.db")
    with serving({"tiny": model_path}, config, Keys(["key-of-alice", "key-of-bob"])) as found:
        yield found


def client_of(served: Any, key: str = "key-of-alice") -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def client(storing: Any) -> Any:
    return client_of(storing)


def nothing_unknown(value: Any, allowed: frozenset[str] | set[str] = frozenset()) -> None:
    """The client's types take fields they do not know; there must be none."""
    if isinstance(value, pydantic.BaseModel):
        assert set(value.model_extra or ()) <= allowed, (type(value), value.model_extra)
        for name in type(value).model_fields:
            nothing_unknown(getattr(value, name), OURS if name == "response" else frozenset())
    elif isinstance(value, list):
        for each in value:
            nothing_unknown(each)


def valid(text: str | bytes) -> dict[str, Any]:
    """A response as JSON, checked against the client's type and for what the type does not say."""
    found = Response.model_validate_json(text, strict=True)
    nothing_unknown(found, OURS)
    data: dict[str, Any] = json.loads(text)
    assert set(data) <= set(Response.model_fields) | OURS
    names = [item["id"] for item in data["output"]]
    assert len(set(names)) == len(names) and data["id"].startswith("resp_")
    if data["status"] in ("completed", "incomplete"):
        usage = data["usage"]
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] and data["error"] is None
        assert (data["incomplete_details"] is not None) == (data["status"] == "incomplete")
        assert (data["completed_at"] is not None) == (data["status"] == "completed")
    return data


def ask(client: Any, **body: Any) -> dict[str, Any]:
    """A response, as it came."""
    return valid(client.responses.with_raw_response.create(**body).http_response.content)


def told(served: Any, **body: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Events of a stream, checked; and the response that they add up to."""
    body |= body.pop("extra_body", {})
    with served.client(headers={"authorization": "Bearer key-of-alice"}) as http:
        response = http.post("/v1/responses", json={**body, "stream": True})
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    return replay(response.text)


def replay(text: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The same for the text of a stream."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        first, second = block.split("\n")
        data = second.removeprefix("data: ")
        nothing_unknown(EVENT.validate_json(data, strict=True))
        events.append(json.loads(data))
        assert first == f"event: {events[-1]['type']}"
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    assert [each["type"] for each in events[:2]] == ["response.created", "response.in_progress"]
    for each in events[:2]:
        assert valid(json.dumps(each["response"]))["status"] == "in_progress" and not each["response"]["output"]
    final = valid(json.dumps(events[-1]["response"]))
    assert events[-1]["type"] == f"response.{final['status']}"

    output: list[dict[str, Any]] = []
    is_open = False
    for each in events[2:-1]:
        kind = each["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert not is_open and each["output_index"] == len(output) and each["item"]["status"] == "in_progress"
            output.append(each["item"])
            is_open = True
            continue
        item = output[each["output_index"]]
        assert is_open and item is output[-1] and each.get("item_id", item["id"]) == item["id"]
        if kind == "content_part.added":
            assert each["part"]["text"] == "" and each["content_index"] == len(item["content"]) == 0
            item["content"].append(each["part"])
            logprobs: list[Any] = []
        elif kind == "output_text.delta":
            item["content"][0]["text"] += each["delta"]
            logprobs += each["logprobs"]
        elif kind == "output_text.done":
            assert each["text"] == item["content"][0]["text"] and each["logprobs"] == logprobs
        elif kind == "content_part.done":
            assert each["part"]["text"] == item["content"][0]["text"]
            assert [one["token"] for one in each["part"]["logprobs"]] == [one["token"] for one in logprobs]
            item["content"][0]["logprobs"] = each["part"]["logprobs"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += each["delta"]
        elif kind == "function_call_arguments.done":
            assert each["arguments"] == item["arguments"]
        else:
            assert kind == "output_item.done"
            assert each["item"]["status"] in ("completed", "incomplete")
            assert each["item"] == {**item, "status": each["item"]["status"]}
            item["status"] = each["item"]["status"]
            is_open = False
    assert not is_open and output == final["output"]
    changing = {"status", "output", "usage", "completed_at", "incomplete_details", "error"}
    changing |= {"store"} if final["status"] == "failed" else set()
    for name in set(final) - changing:
        assert final[name] == events[0]["response"][name]
    return events, final


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two responses that differ in names, times and what was remembered only."""

    def plain(response: dict[str, Any]) -> dict[str, Any]:
        output = [{**item, "id": "", "call_id": ""} for item in response["output"]]
        usage = {**response["usage"], "input_tokens_details": None}
        return {**response, "id": "", "created_at": 0, "completed_at": 0, "output": output, "usage": usage}

    assert plain(one) == plain(other)


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item.get("content", ()))


def chat(client: Any, messages: list[Any], **more: Any) -> tuple[str, int]:
    """What the other API answers, and how long the prompt is there."""
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "seed": 4} | more
    answer = client.chat.completions.create(messages=messages, **options)
    return answer.choices[0].message.content, answer.usage.prompt_tokens


def test_a_text(client: Any) -> None:
    answer = ask(client, input="Who are you?", **seeded())
    assert answer["status"] == "incomplete" and answer["incomplete_details"] == {"reason": "max_output_tokens"}
    (item,) = answer["output"]
    assert item["status"] == "incomplete" and item["role"] == "assistant" and answer["usage"]["output_tokens"] == 9
    expected = chat(client, [{"role": "user", "content": "Who are you?"}])
    assert (text_of(answer), answer["usage"]["input_tokens"]) == expected
    assert answer["store"] is True and answer["temperature"] == 0.6 and answer["tools"] == []
    same(ask(client, input="Who are you?", **seeded()), answer)
    cached = [ask(client, input="once more " * 40, **seeded())["usage"]["input_tokens_details"] for _ in range(2)]
    assert cached[0]["cached_tokens"] < cached[1]["cached_tokens"]
    whole = ask(client, input="Who are you?", **seeded(stop=text_of(answer)[3:5]))
    assert whole["status"] == "completed" and text_of(answer).startswith(text_of(whole))
    assert whole["output"][0]["status"] == "completed" and whole["completed_at"] >= whole["created_at"]


def test_what_is_said_is_repeated(client: Any) -> None:
    given: dict[str, Any] = {
        "instructions": "Be brief.", "temperature": 0.25, "top_p": 0.5, "metadata": {"a": "b"}, "user": "u",
        "safety_identifier": "s", "prompt_cache_key": "k", "truncation": "disabled", "tools": [SWITCH],
        "tool_choice": {"type": "function", "name": "switch"}, "parallel_tool_calls": False,
        "service_tier": "default", "max_output_tokens": 40, "model": "tiny",
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
    }  # fmt: skip
    answer = ask(client, input="x", **given)
    assert {name: answer[name] for name in given} == given
    assert ask(client, input="x", background=False, **OPTIONS)["background"] is False


def test_items_and_instructions(client: Any) -> None:
    """Every way to say the same, against chat."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A llama."},
        {"role": "user", "content": "More."},
    ]
    expected = chat(client, messages)
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
        answer = ask(client, **body, **seeded())  # type: ignore[arg-type]
        assert (text_of(answer), answer["usage"]["input_tokens"]) == expected


def test_a_stream(client: Any, storing: Any) -> None:
    whole = ask(client, input="Who are you?", **seeded())
    events, final = told(storing, input="Who are you?", **seeded())
    same(final, whole)
    assert len([each for each in events if each["type"] == "response.output_text.delta"]) > 1
    kept = client.responses.with_raw_response.retrieve(final["id"]).http_response.content
    assert json.loads(kept) == final
    # The client puts the pieces together by itself.
    with client.responses.stream(input="Who are you?", **OPTIONS | {"max_output_tokens": 60}) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    events = list(client.responses.create(input="Who are you?", stream=True, **seeded()))
    assert events[-1].response.output_text == text_of(whole) and text


def test_logprobs(client: Any, storing: Any) -> None:
    more: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 3}
    answer = ask(client, input="Who are you?", **more, **seeded())
    messages = [{"role": "user", "content": "Who are you?"}]
    expected = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=9, seed=4, logprobs=True, top_logprobs=3
    )
    found = answer["output"][0]["content"][0]["logprobs"]
    assert found == [token.to_dict() for token in expected.choices[0].logprobs.content] and len(found) == 9
    assert answer["top_logprobs"] == 3 and all(len(token["top_logprobs"]) == 3 for token in found)
    _, final = told(storing, input="Who are you?", **more, **seeded())
    same(final, answer)
    plain = ask(client, input="Who are you?", include=more["include"], **seeded())
    assert [token["logprob"] for token in plain["output"][0]["content"][0]["logprobs"]] == [t["logprob"] for t in found]
    called = ask(
        client, input="x", **more, tools=[SWITCH], tool_choice="required", model="tiny", extra_body={"seed": 1}
    )
    assert called["output"][0]["type"] == "function_call"


def test_structured_answers(client: Any, storing: Any) -> None:
    class Light(pydantic.BaseModel):
        on: bool

    options: dict[str, Any] = {"input": "Is it on?", **seeded(5), "max_output_tokens": 200}
    parsed = client.responses.parse(text_format=Light, **options)
    assert isinstance(parsed.output_parsed, Light) and parsed.status == "completed"
    with client.responses.stream(text_format=Light, **options) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Light)
    answer = ask(client, text={"format": {"type": "json_object"}}, **options)
    if answer["status"] == "completed":
        assert isinstance(json.loads(text_of(answer)), dict)
    plain = ask(client, text={"format": {"type": "text"}}, input="Who are you?", **seeded())
    assert plain["text"] == ask(client, input="Who are you?", **seeded())["text"]


def test_tools(client: Any, storing: Any) -> None:
    options: dict[str, Any] = {"input": "Light!", "tools": [SWITCH], **seeded(1), "max_output_tokens": 60}
    for choice in ("required", {"type": "function", "name": "switch"}):
        answer = ask(client, tool_choice=choice, **options)
        call = answer["output"][0]
        assert call["type"] == "function_call" and call["name"] == "switch" and call["status"] == "completed"
        assert isinstance(json.loads(call["arguments"])["on"], bool) and answer["tool_choice"] == choice
        if choice != "required":
            assert len(answer["output"]) == 1
        events, final = told(storing, tool_choice=choice, **options)
        same(final, answer)
        assert any(each["type"] == "response.function_call_arguments.delta" for each in events)
    none = ask(client, tool_choice="none", **options)
    assert [item["type"] for item in none["output"]] == ["message"]
    without = ask(client, **{**options, "tools": []})
    assert without["usage"]["input_tokens"] == none["usage"]["input_tokens"]
    auto = ask(client, **options)
    assert auto["usage"]["input_tokens"] > none["usage"]["input_tokens"] and auto["tool_choice"] == "auto"
    with client.responses.stream(tool_choice="required", **options) as stream:
        assert stream.get_final_response().output[0].type == "function_call"


def test_a_tool_answers(client: Any) -> None:
    """The round trip, with what the client sends back by itself, with the store, and with chat."""
    options: dict[str, Any] = {"tools": [SWITCH]}
    first = client.responses.create(
        input="Light!",
        tool_choice={"type": "function", "name": "switch"},
        max_output_tokens=60,
        model="tiny",
        **options,
    )
    (call,) = first.output
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "It is on."}
    items: list[Any] = [{"role": "user", "content": "Light!"}, *first.output, output]
    again = ask(client, input=items, **options, **seeded())
    stored = ask(client, input=[output], previous_response_id=first.id, **options, **seeded())
    in_parts = {**output, "output": [{"type": "input_text", "text": "It is"}, {"type": "input_text", "text": " on."}]}
    parts = ask(client, input=[in_parts], previous_response_id=first.id, **options, **seeded())
    messages = [
        {"role": "user", "content": "Light!"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "It is on."},
    ]  # fmt: skip
    function = {name: value for name, value in SWITCH.items() if name != "type"}
    expected = chat(client, messages, tools=[{"type": "function", "function": function}])
    for answer in (again, stored, parts):
        assert (text_of(answer), answer["usage"]["input_tokens"]) == expected
    with pytest.raises(openai.BadRequestError, match="no call waits"):
        client.responses.create(model="tiny", input=[output], **options)
    with pytest.raises(openai.BadRequestError, match="no call waits"):
        client.responses.create(model="tiny", input=[output, output], previous_response_id=first.id, **options)


def test_several_calls_and_their_answers(client: Any) -> None:
    """Llama 3.1 has one call in a message: each then stands before what it gave."""
    options: dict[str, Any] = {"tools": [SWITCH]}
    for seed in range(40):
        first = ask(
            client, input="Light!", tool_choice="required", parallel_tool_calls=True, **options,
            **{**seeded(seed, temperature=2), "max_output_tokens": 150},
        )  # fmt: skip
        calls = first["output"]
        if len(calls) > 1 and first["status"] == "completed":
            break
    else:
        pytest.fail("never two calls")
    outputs = [{"type": "function_call_output", "call_id": c["call_id"], "output": f"{i}"} for i, c in enumerate(calls)]
    answer = ask(client, input=outputs[::-1], previous_response_id=first["id"], **options, **seeded())
    listed = [item for pair in zip(calls, outputs, strict=True) for item in pair]
    apart = ask(client, input=[{"role": "user", "content": "Light!"}, *listed], **options, **seeded())
    assert text_of(answer) == text_of(apart) and answer["usage"]["input_tokens"] == apart["usage"]["input_tokens"]


def test_a_conversation_goes_on(client: Any) -> None:
    first = ask(client, input="Who are you?", instructions="Shout.", **seeded())
    second = ask(client, input="And then?", previous_response_id=first["id"], **seeded())
    third = ask(client, input=[{"role": "user", "content": "Why?"}], instructions="Whisper.",
                previous_response_id=second["id"], **seeded())  # fmt: skip
    messages = [
        {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": text_of(first)},
        {"role": "user", "content": "And then?"}, {"role": "assistant", "content": text_of(second)},
        {"role": "user", "content": "Why?"},
    ]  # fmt: skip
    assert (text_of(second), second["usage"]["input_tokens"]) == chat(client, messages[:3])  # nothing is shouted
    expected = chat(client, [{"role": "system", "content": "Whisper."}, *messages])
    assert (text_of(third), third["usage"]["input_tokens"]) == expected
    assert third["previous_response_id"] == second["id"]
    # Another way from the same place.
    other = ask(client, input="Where?", previous_response_id=first["id"], **seeded())
    assert (text_of(other), other["usage"]["input_tokens"]) == chat(
        client, [*messages[:2], {"role": "user", "content": "Where?"}]
    )
    client.responses.delete(first["id"])
    for name in (first["id"], second["id"]):
        with pytest.raises(openai.BadRequestError, match=first["id"]) as caught:
            client.responses.create(input="x", previous_response_id=name, **OPTIONS)
        assert caught.value.code == "previous_response_not_found"
    assert client.responses.retrieve(second["id"]).output_text == text_of(second)


def test_a_call_that_broke_off_is_not_repeated(client: Any) -> None:
    options: dict[str, Any] = {"tools": [SWITCH]}
    cut = ask(client, input="Light!", tool_choice="required", **options, **{**seeded(1), "max_output_tokens": 14})
    assert cut["status"] == "incomplete"
    if cut["output"][0]["type"] == "function_call":
        assert cut["output"][0]["status"] == "incomplete"
    assert ask(client, input="Go on.", previous_response_id=cut["id"], **options, **seeded())["output"]


def test_what_was_said_earlier_goes_where_there_is_no_room(client: Any) -> None:
    first = ask(client, input="Once " * 90, **seeded())
    second = ask(client, input="Twice.", previous_response_id=first["id"], **seeded())
    third = ask(client, input="word " * 30, previous_response_id=second["id"], truncation="auto", **seeded())
    assert [item["type"] for item in third["dropped_items"]] == ["message"] * 2
    assert all(item["input_index"] is None for item in third["dropped_items"])
    assert third["dropped_items"][1]["id"] == first["output"][0]["id"]
    messages = [
        {"role": "user", "content": "Twice."}, {"role": "assistant", "content": text_of(second)},
        {"role": "user", "content": "word " * 30},
    ]  # fmt: skip
    assert (text_of(third), third["usage"]["input_tokens"]) == chat(client, messages)
    assert ask(client, input="Hi.", truncation="auto", **OPTIONS)["dropped_items"] == []


class Ticket:
    """Chunks, and an error where they are not all."""

    prompt = (1, 2, 3)

    def __init__(self, texts: list[str], error: Exception | None) -> None:
        self._texts, self._error = texts, error

    async def __aiter__(self) -> Any:
        usage, timings = SimpleNamespace(completion_tokens=len(self._texts)), SimpleNamespace(reused_tokens=0)
        done = SimpleNamespace(usage=usage, timings=timings)
        for i, text in enumerate(self._texts):
            last = self._error is None and i == len(self._texts) - 1
            how = {"completion": done, "finish_reason": "stop"} if last else {"completion": None, "finish_reason": None}
            yield 0, SimpleNamespace(text=text, token_id=text, logprob=-1.0, top_logprobs=[], **how)
        if self._error is not None:
            raise self._error


def streamed(
    texts: list[str], functions: set[str], keep: Any, error: Exception | None = None, logprobs: bool = False
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The stream that tokens with these texts become."""
    head = {
        "id": "resp_1", "object": "response", "created_at": 1, "completed_at": None, "status": "in_progress",
        "error": None, "incomplete_details": None, "instructions": None, "model": "tiny", "output": [],
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "usage": None, "store": True,
    }  # fmt: skip
    tokenizer = SimpleNamespace(token_bytes=lambda text: text.encode())
    call: Any = SimpleNamespace(tokenizer=tokenizer, done=lambda *_: None)
    ticket: Any = Ticket(texts, error)
    answer = Answer(call, ticket, Plan(frozenset(functions)), head, keep, logprobs=logprobs)

    async def read() -> str:
        return b"".join([part async for part in answer.events()]).decode()

    return replay(asyncio.run(read()))


CALL = '<function=switch>{"on": true}</function>'


@pytest.mark.parametrize("pieces", ["characters", "words"])
def test_text_between_calls(pieces: str) -> None:
    """Items follow each other, and only tokens of text have their log-probabilities told."""

    async def keep(response: dict[str, Any]) -> None:
        pass

    text = f"Well. {CALL}Then {CALL}; {CALL} or so."
    texts = list(text) if pieces == "characters" else re.findall(r"\w+|\W", text)
    _, final = streamed(texts, {"switch"}, keep, logprobs=True)
    kinds = {"message": "m", "function_call": "c"}
    assert "".join(kinds[item["type"]] for item in final["output"]) == "mcmccm"
    assert {item["status"] for item in final["output"]} == {"completed"} and final["status"] == "completed"
    for item in final["output"]:
        if item["type"] == "message":
            (part,) = item["content"]
            assert "".join(token["token"] for token in part["logprobs"]) == part["text"]
        else:
            assert json.loads(item["arguments"]) == {"on": True}


@pytest.mark.parametrize("functions", [set(), {"switch"}])
def test_an_error_in_the_middle(functions: set[str]) -> None:
    """It ends the item and the response, and is kept."""
    kept: list[str] = []

    async def keep(response: dict[str, Any]) -> None:
        kept.append(json.dumps(response))

    async def full(response: dict[str, Any]) -> None:
        raise ResourceError("the disk is full")

    late = ApiError(503, "it took too long", code="deadline_exceeded")
    texts = ['{"name": "switch", ', '"parameters": {"on', '": tr'] if functions else ["Once ", "upon"]
    events, final = streamed(texts, functions, keep, late)
    assert final["status"] == "failed" and final["error"] == {"code": "server_error", "message": "it took too long"}
    assert final["output"][0]["status"] == "incomplete" and [json.loads(each) for each in kept] == [final]
    assert events[-2]["type"] == "response.output_item.done"
    with pytest.raises(ApiError):  # nothing was sent
        streamed([], functions, keep, late)
    for error in (None, late):
        _, final = streamed(texts, functions, full, error)
        assert final["status"] == "failed" and final["store"] is False
