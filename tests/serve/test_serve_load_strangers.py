"""`herd bench serve` with servers that have their own ways, fields that change an answer, and a client that stalls."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from pydantic import ValidationError

from herd.serve.load import generator
from herd.serve.load.generator import LoadConfig
from herd.serve.load.notes import bottlenecks
from tests.serve.scripted_server import DONE, STREAM, Request, event, load, only, serving

HELD_OPEN = STREAM.replace(b"connection: close\r\n", b"")
CHUNKED = HELD_OPEN.replace(b"\r\n\r\n", b"\r\ntransfer-encoding: chunked\r\n\r\n")
ANSWER = event({"role": "assistant", "content": ""}) + event({"content": "x"}) + event({"content": "y"}, "stop")


def usage(**fields: Any) -> bytes:
    counts = {"prompt_tokens": 9, "completion_tokens": 2}
    return b"data: " + json.dumps({"usage": counts | fields}).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("answer", "counted_by"),
    [
        (STREAM.replace(b"HTTP/1.1", b"HTTP/1.0") + ANSWER + DONE, "events"),
        (STREAM.replace(b"text/event-stream", b"text/event-stream; charset=utf-8") + ANSWER + DONE, "events"),
        (CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(ANSWER + DONE), ANSWER + DONE), "events"),
        (STREAM + b'data: {"choices": [], "prompt_filter_results": []}\n\n' + ANSWER + DONE, "events"),
        (STREAM + ANSWER + usage() + DONE, "usage"),
        (STREAM + ANSWER + usage(completion_tokens=0) + DONE, "events"),
    ],
    ids=["HTTP/1.0", "a character set", "chunks", "a first event without choices", "usage alone", "usage of nothing"],
)
def test_whole_answers_in_other_shapes(answer: bytes, counted_by: str) -> None:
    async def script(request: Request) -> None:
        await request.write(answer)

    with serving(script) as server:
        stage = only(load(server))
    assert stage["requests"]["ok"] == 6 and stage["errors"] == []
    assert stage["tokens"]["counted_by"][counted_by] == 6 and stage["tokens"]["output"] == 12
    assert stage["tpot"]["n"] == 6  # so that a bound on it is looked at


def test_a_whole_answer_is_one_though_its_connection_stays_open() -> None:
    async def script(request: Request) -> None:
        await request.write(HELD_OPEN + ANSWER + (DONE if request.number % 2 else b""))
        await asyncio.sleep(30)

    with serving(script) as server:
        stage = only(load(server, timeout=0.8))
    assert stage["requests"]["ok"] == 3 and stage["requests"]["timeout"] == 3


def test_a_request_is_for_one_answer() -> None:
    rest: dict[str, Any] = {"url": "localhost", "rates": (1.0,), "requests": 1}
    assert LoadConfig(**rest, extra={"n": 1}).extra == {"n": 1}
    with pytest.raises(ValidationError, match="one answer"):
        LoadConfig(**rest, extra={"n": 2})


def test_a_stage_has_a_most_of_requests() -> None:
    LoadConfig(url="localhost", rates=(1.0, 1000.0), duration=10_000)
    with pytest.raises(ValidationError, match="at most 10000000 requests"):
        LoadConfig(url="localhost", rates=(1.0, 1000.0), duration=10_001)


@pytest.mark.parametrize(
    ("extra", "asked"),
    [
        ({}, 128),
        ({"max_tokens": 4}, None),
        ({"max_tokens": None, "max_completion_tokens": 6}, None),
        ({"max_tokens": 20}, 20),
        ({"max_tokens": None}, None),
    ],
)
def test_what_was_asked_for_is_what_was_sent(extra: dict[str, Any], asked: int | None) -> None:
    async def script(request: Request) -> None:
        await request.stream(tokens=4)

    with serving(script) as server:
        found = [note for note in load(server, extra=extra).result["notes"] if "asked for" in note]
    assert len(found) == (asked is not None)
    assert asked is None or f"4 tokens on average of {asked} asked for" in found[0]


def test_a_stall_of_the_client_counts_for_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of a second in which no answer is looked at, out of two: no percentile may pass over that."""
    monkeypatch.setattr(generator, "_TICK", 0.004)

    async def script(request: Request) -> None:
        if request.number == 10:
            asyncio.run_coroutine_threadsafe(stall(), clients[0])
        await request.stream(first=0.02)

    async def stall() -> None:
        time.sleep(0.3)

    clients: list[asyncio.AbstractEventLoop] = []
    known = generator.locate

    async def locate(*arguments: Any) -> Any:
        clients.append(asyncio.get_running_loop())
        return await known(*arguments)

    monkeypatch.setattr(generator, "locate", locate)
    with serving(script) as server:
        stage = only(load(server, concurrency=(1,), duration=2.0))
    lag = stage["client"]["lag"]
    assert lag["n"] >= 299 and lag["p99"] > 0.1
    assert any("looked at answers" in found for found in bottlenecks(stage["client"]))
