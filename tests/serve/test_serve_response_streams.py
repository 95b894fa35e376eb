"""Events of /v1/responses for tokens that are given: text between calls, and errors in the middle."""

from __future__ import annotations

import asyncio
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("openai")

from herd.errors import ResourceError
from herd.serve.api.response_answer import Answer
from herd.serve.api.tools import Plan
from herd.serve.errors import ApiError, as_api_error
from tests.serve.response_checks import replay


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
    call: Any = SimpleNamespace(tokenizer=tokenizer, done=lambda *_: None, fail=as_api_error)
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
