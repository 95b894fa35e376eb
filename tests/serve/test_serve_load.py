"""`herd bench serve` against a scripted server: what is sent and when, and what is measured.

Bounds on time are one-sided wherever a busy machine could make things slower.
"""

from __future__ import annotations

import json
from typing import Any

from herd.serve.load.figures import Record
from herd.serve.load.generator import Loaded
from tests.serve.scripted_server import Request, Server, load, only, serving


def matched(server: Server, loaded: Loaded) -> list[tuple[Request, Record]]:
    """What the server saw of every request of a run without warm-up, and what the client did."""
    by_index = {record.index: record for record in loaded.records[0]}
    names = [request.body["messages"][-1]["content"].split(":")[0] for request in server.requests]
    return [(request, by_index[int(name.split(".")[1])]) for request, name in zip(server.requests, names, strict=True)]


def latest_start(pairs: list[tuple[Request, Record]]) -> float:
    """The clock of client and server is one. No request comes before it is sent, so a stage began at this moment of it
    or earlier."""
    return min(request.came - record.started for request, record in pairs)


def test_times_are_those_of_the_server() -> None:
    async def script(request: Request) -> None:
        await request.stream(first=0.3, gap=0.05, tokens=5)

    with serving(script) as server:
        loaded = load(server)
    pairs = matched(server, loaded)
    for request, record in pairs:
        assert record.outcome == "ok" and record.finish_reason == "length" and record.tokens_out == 5
        assert record.ttft is not None and record.tpot is not None and record.connected is not None
        assert 0.3 <= record.ttft <= record.e2e and 0.5 <= record.e2e < 15
        assert record.due <= record.started <= record.connected <= record.events[0] <= record.finished <= record.ended
        assert len(request.sent) == len(record.events) == 5
    # No text is seen before it is sent: this bounds the same start from below, and the two bounds lie close together.
    texts = [(sent, seen) for request, record in pairs for sent, seen in zip(request.sent, record.events, strict=True)]
    earliest = max(sent - seen for sent, seen in texts)
    assert 0 <= latest_start(pairs) - earliest < 0.5
    stage = only(loaded)
    assert stage["ttft"]["n"] == 6 and 0.3 <= stage["ttft"]["p50"] <= stage["ttft"]["max"]
    assert stage["ttft"]["p90"] is None and stage["e2e"]["p99"] is None  # six values show a median at most
    assert stage["gap"]["n"] == 24
    assert stage["tokens"] == {"input": 54, "cached": 12, "output": 30, "counted_by": {"usage": 6, "events": 0}}
    assert loaded.answered == 6


def test_a_stall_delays_no_arrival_and_is_counted_whole() -> None:
    """Coordinated omission: a server that answers nobody for a second meets all requests of that second."""

    async def script(request: Request) -> None:
        await request.stream(first=max(server.requests[0].came + 1.0 - request.came, 0.0))

    with serving(script) as server:
        loaded = load(server, rates=(40.0,), requests=30)
    assert server.most > 10  # nobody waited for anybody
    pairs = matched(server, loaded)
    stalled_until = server.requests[0].came + 1.0 - latest_start(pairs)
    assert all(record.ttft is not None and record.ttft >= stalled_until - record.due for _, record in pairs)
    assert only(loaded)["seconds"]["due"] == 30 / 40 and only(loaded)["load"] == {"rate": 40.0, "clients": None}


def test_a_closed_loop_has_so_many_under_way_and_no_more() -> None:
    async def script(request: Request) -> None:
        await request.stream(first=0.05)

    with serving(script) as server:
        loaded = load(server, concurrency=(3,), requests=12)
        assert server.most == 3 and len(server.requests) == 12
        timed = load(server, concurrency=(2,), duration=0.5)
    stage = only(loaded)
    assert stage["load"] == {"rate": None, "clients": 3} and stage["client"]["late"]["n"] == 0
    assert stage["requests"]["ok"] == 12
    assert any("hide queueing" in note for note in loaded.result["notes"])
    assert 2 <= only(timed)["requests"]["ok"] <= 22 and only(timed)["seconds"]["due"] == 0.5
    assert all(record.due < 0.5 for record in timed.records[0])


def test_requests_say_what_was_asked_for() -> None:
    async def script(request: Request) -> None:
        await request.stream(usage=False)

    extra = {"ignore_eos": True, "seed": None}
    with serving(script) as server:
        options: dict[str, Any] = {"warmup": 2, "shared_prefix": 3, "max_tokens": (2, 9), "extra": extra, "seed": 4}
        loaded = load(server, key="secret", requests=30, **options)
        load(server, endpoint="completions", model="other", requests=1, shared_prefix=3)
    assert loaded.result["model"] == "fake-model" and only(loaded)["requests"]["due"] == 30
    assert only(loaded)["tokens"]["counted_by"] == {"usage": 0, "events": 30}
    assert "secret" not in json.dumps(loaded.result)
    *chats, completion = server.requests
    assert len(chats) == 32 and completion.path == "/v1/completions" and completion.body["model"] == "other"
    assert len(completion.body["prompt"].split()) == 8 and "authorization" not in completion.headers
    texts = []
    for request in chats:
        assert request.path == "/v1/chat/completions" and request.headers["authorization"] == "bearer secret"
        body = request.body
        assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["temperature"] == 0
        assert body["ignore_eos"] is True and "seed" not in body and 2 <= body["max_tokens"] <= 9
        system, user = body["messages"]
        assert system["role"] == "system" and len(system["content"].split()) == 3
        texts.append(user["content"].split())
    assert len({request.body["messages"][0]["content"] for request in chats}) == 1
    assert all(len(words) == 5 for words in texts) and len({words[0] for words in texts}) == 32
    assert len({request.body["max_tokens"] for request in chats}) > 4
