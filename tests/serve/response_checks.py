"""Responses of /v1/responses checked against the client's types, and streams against the response they add up to."""

from __future__ import annotations

import json
from typing import Any

import pydantic
from openai.types.responses import Response, ResponseStreamEvent

EVENT = pydantic.TypeAdapter(ResponseStreamEvent)
OURS = {"store", "dropped_items"}  # fields that the client's types do not have
OPTIONS: dict[str, Any] = {"model": "tiny", "max_output_tokens": 9}


def seeded(seed: int = 4, **more: Any) -> dict[str, Any]:
    return {**OPTIONS, "extra_body": {"seed": seed, **more}}


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
