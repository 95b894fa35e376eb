"""What `herd bench serve` makes of a server that breaks off, refuses, is silent or late."""

from __future__ import annotations

import asyncio

import pytest

from herd.errors import ResourceError, UsageError
from tests.serve.scripted_server import DONE, STREAM, Request, event, load, only, serving

BROKEN: dict[str, tuple[bytes, str]] = {
    "no end": (STREAM + event({"content": "x"}), "without a finish_reason"),
    "no reason": (STREAM + event({"content": "x"}) + DONE, "[DONE] without a finish_reason"),
    "not JSON": (STREAM + b"data: {\n\n" + DONE, "not JSON"),
    "too deep": (STREAM + b"data: " + b"[" * 100_000 + b"\n\n", "not JSON"),
    "error": (STREAM + b'data: {"error": {"message": "out of memory"}}\n\n' + DONE, "out of memory"),
    "error field": (STREAM + b'error: {"code": 500, "message": "it broke"}\n\n', "it broke"),
    "no choices": (STREAM + b'data: {"a": 1}\n\n', "no piece of an answer"),
    "odd choice": (STREAM + b'data: {"choices": [1]}\n\n', "no object"),
    "late text": (STREAM + event({"content": "x"}, "stop") + event({"content": "y"}) + DONE, "after the finish_reason"),
    "whole": (b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{}", "not a stream"),
    "cut": (STREAM.replace(b"conn", b"content-length: 9999\r\nconn", 1) + event({"content": "x"}), "cut off"),
    "bad HTTP": (STREAM.replace(b"conn", b"transfer-encoding: chunked\r\nconn", 1) + b"zz\r\n", "cut off"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_streams_are_no_answers(name: str) -> None:
    answer, words = BROKEN[name]

    async def script(request: Request) -> None:
        await (request.write(answer) if request.number % 2 else request.stream())

    with serving(script) as server:
        loaded = load(server)
    stage = only(loaded)
    assert stage["requests"]["ok"] == 3 and stage["requests"]["broken"] == 3
    (error,) = stage["errors"]
    assert words in error["detail"] and error["count"] == 3 and error["outcome"] == "broken"
    assert stage["e2e"]["n"] == 3 and stage["goodput"]["share"] == 0.5


def test_what_is_no_http_and_who_hangs_up_has_no_connection() -> None:
    async def script(request: Request) -> None:
        await request.write(b"hello\r\n\r\n" if request.number % 2 else b"")

    with serving(script) as server:
        loaded = load(server, requests=4)
    assert only(loaded)["requests"]["connection"] == 4 and len(only(loaded)["errors"]) == 2
    assert only(loaded)["e2e"]["max"] is None and loaded.answered == 0


def test_refusals_and_errors_by_status() -> None:
    async def script(request: Request) -> None:
        if request.number == 0:
            await request.reply(429, {"error": {"message": "busy"}}, "Retry-After: 7")
        elif request.number == 1:
            await request.reply(429, {"error": {"message": "busy"}})
        elif request.number == 2:
            await request.reply(503, {"error": {"message": "draining"}}, "retry-after: 1")
        elif request.number == 3:
            await request.reply(500, "a text")
        else:
            await request.stream()

    with serving(script) as server:
        loaded = load(server)
    stage = only(loaded)
    assert stage["requests"] | {"refused": 3, "http_error": 1, "ok": 2} == stage["requests"]
    found = {(each["status"], each["detail"]): (each["count"], each["with_retry_after"]) for each in stage["errors"]}
    assert found == {(429, "busy"): (2, 1), (503, "draining"): (1, 1), (500, "a text"): (1, 0)}
    assert loaded.records[0][0].retry_after == "7"


def test_a_refused_client_of_the_closed_loop_waits() -> None:
    async def script(request: Request) -> None:
        await request.reply(429, {}, "Retry-After: 0.3")

    with serving(script) as server:
        loaded = load(server, concurrency=(1,), duration=0.7)
    assert 1 <= only(loaded)["requests"]["refused"] <= 3


def test_answers_that_take_too_long_rank_above_all() -> None:
    async def script(request: Request) -> None:
        if request.number % 2:
            await request.write(STREAM + event({"content": "x"}))
            await asyncio.sleep(60)
        await request.stream()

    with serving(script) as server:
        loaded = load(server, requests=10, timeout=2.0)
    stage = only(loaded)
    assert stage["requests"]["timeout"] == 5 and stage["requests"]["ok"] == 5
    assert stage["e2e"]["n"] == 10 and stage["e2e"]["max"] >= 2.0 and stage["e2e"]["at_least"] == ("max",)
    assert stage["ttft"]["n"] == 10 and stage["ttft"]["at_least"] == ()  # their first text had come


def test_the_first_request_tells_what_is_wrong() -> None:
    async def script(request: Request) -> None:
        message = f"no, because {request.body.get('why')}"
        await request.reply(request.body["code"], {"error": {"message": message}})

    with serving(script) as server:
        for code, kind, words in (
            (401, UsageError, "--api-key"),
            (404, UsageError, "--model"),
            (422, UsageError, "--extra"),
            (503, ResourceError, "until the server is ready"),
        ):
            with pytest.raises(kind, match=words) as caught:
                load(server, warmup=1, extra={"code": code})
            assert "no, because" in str(caught.value)
        for why in ("this model's maximum context length is 9", "it exceeds the available context size"):
            with pytest.raises(UsageError, match="--prompt-tokens") as caught:
                load(server, warmup=1, extra={"code": 400, "why": why})
            assert "--model" not in str(caught.value)

    async def mute(request: Request) -> None:
        await request.write(STREAM)

    with serving(mute) as server, pytest.raises(ResourceError, match="first request already fails"):
        load(server, warmup=1)
