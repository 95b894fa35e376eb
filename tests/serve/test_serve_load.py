"""`herd bench serve` against a scripted server: what is sent and when, what is measured, and what counts as broken.

Bounds on time are one-sided wherever a busy machine could make things slower.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from herd.cli import main
from herd.errors import ResourceError, UsageError
from herd.serve.load.figures import Record
from herd.serve.load.generator import LoadConfig, Loaded, run

STREAM = b"HTTP/1.1 200 OK\r\nserver: fake\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"


@dataclass
class Request:
    """What the server got, and a way to answer."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    came: float
    write: Callable[[bytes], Awaitable[None]]
    sent: list[float] = field(default_factory=list)

    async def reply(self, code: int, data: Any, *headers: str) -> None:
        head = "\r\n".join([f"HTTP/1.1 {code} X", "content-type: application/json", *headers, "connection: close"])
        await self.write(f"{head}\r\n\r\n{json.dumps(data)}".encode())

    async def stream(self, *, first: float = 0.0, gap: float = 0.0, tokens: int = 4, usage: bool = True) -> None:
        """A good answer."""
        await self.write(STREAM + b": a comment\n\n" + event({"role": "assistant", "content": ""}))
        await asyncio.sleep(first)
        for i in range(tokens):
            await asyncio.sleep(gap if i else 0.0)
            self.sent.append(time.monotonic())
            await self.write(event({"content": "x"}))
        await self.write(event({}, finish="length"))
        if usage:
            counts = {"prompt_tokens": 9, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 2}}
            await self.write(b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n")
        await self.write(DONE)


def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": finish}]}).encode() + b"\r\n\r\n"


Script = Callable[[Request], Awaitable[None]]


@dataclass
class Server:
    """Answers as `script` says, in a thread of its own; knows all that came and how many were under way at once."""

    script: Script
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    running: int = 0
    most: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            method, path, *headers = (
                (await reader.readuntil(b"\r\n\r\n")).decode().replace(" ", "\r\n", 2).split("\r\n")
            )
            named = dict(line.lower().split(": ", 1) for line in headers[1:] if line)
            body = json.loads(await reader.readexactly(int(named.get("content-length", 0))) or b"{}")
        except asyncio.IncompleteReadError:  # a look whether the server is there
            writer.close()
            return

        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        request = Request(len(self.requests), path, named, body, time.monotonic(), write)
        if method == "GET":
            await request.reply(200, {"data": [{"id": "fake-model"}]})
        else:
            self.requests.append(request)
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                await self.script(request)
            except (ConnectionError, asyncio.CancelledError):
                pass
            finally:
                self.running -= 1
        writer.close()


@contextlib.contextmanager
def serving(script: Script) -> Iterator[Server]:
    server, ready, loop = Server(script), threading.Event(), asyncio.new_event_loop()

    async def listen() -> None:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, backlog=500)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        ready.set()

    def work() -> None:
        loop.create_task(listen())
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def load(server: Server, *, key: str | None = None, **options: Any) -> Loaded:
    defaults: dict[str, Any] = {"rates": (60.0,), "requests": 6, "warmup": 0, "timeout": 20.0, "prompt_tokens": 5}
    if "concurrency" in options:
        del defaults["rates"]
    if "duration" in options:
        del defaults["requests"]
    return run(LoadConfig(url=server.url, **(defaults | options)), key)


def only(loaded: Loaded) -> dict[str, Any]:
    (stage,) = loaded.result["stages"]
    return stage


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


BROKEN: dict[str, tuple[bytes, str]] = {
    "no end": (STREAM + event({"content": "x"}, finish="stop"), "without [DONE]"),
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


def test_the_first_request_tells_what_is_wrong() -> None:
    async def script(request: Request) -> None:
        await request.reply(request.body["code"], {"error": {"message": "no, because"}})

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

    async def mute(request: Request) -> None:
        await request.write(STREAM)

    with serving(mute) as server, pytest.raises(ResourceError, match="first request already fails"):
        load(server, warmup=1)


def bench(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["bench", "serve", *map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code


SPREAD = {
    "type": "object",
    "required": ["n", "p50", "p90", "p99", "max", "at_least"],
    "additionalProperties": False,
    "properties": {"n": {"type": "integer"}, "at_least": {"type": "array"}}
    | {key: {"type": ["number", "null"]} for key in ("p50", "p90", "p99", "max")},
}
STAGE = {
    "type": "object",
    "properties": {key: SPREAD for key in ("ttft", "tpot", "gap", "e2e")}
    | {
        "load": {"type": "object", "required": ["rate", "clients"]},
        "seconds": {"type": "object", "required": ["due", "total"]},
        "requests": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 8},
        "errors": {"type": "array", "items": {"required": ["outcome", "status", "detail", "count"]}},
        "tokens": {"type": "object", "required": ["input", "cached", "output", "counted_by"]},
        "throughput": {"type": "object", "additionalProperties": {"type": ["number", "null"]}},
        "goodput": {"required": ["requests_per_second", "good", "share", "interval", "objectives"]},
        "client": {
            "required": ["late", "lag", "cpu_share", "out_of_files"],
            "properties": {"late": SPREAD, "lag": SPREAD, "cpu_share": {"type": "number", "minimum": 0}},
        },
        "interrupted": {"type": "boolean"},
    },
}
STAGE["required"] = list(STAGE["properties"])  # type: ignore[call-overload]
RESULT = {
    "type": "object",
    "required": ["url", "model", "local", "settings", "interrupted", "stages", "knee", "notes"],
    "properties": {
        "stages": {"type": "array", "items": STAGE, "minItems": 1},
        "notes": {"type": "array", "items": {"type": "string"}},
        "knee": {"type": ["object", "null"], "required": ["definition", "rate", "goodput", "share", "fails_at"]},
    },
}


def test_json_records_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def script(request: Request) -> None:
        if request.number == 3:
            await request.reply(429, {"error": {"message": "bu\x1b[2Jsy"}}, "Retry-After: 7")
        else:
            await request.stream(first=0.01, gap=0.01)

    records, prompts = tmp_path / "r.jsonl", tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "one"}\n\n{"messages": [{"role": "user", "content": "two"}], "id": 7}\n')
    options = ("--requests", 8, "--prompts", prompts, "--records", records)
    with serving(script) as server:
        assert bench(server.url, "--rates", "20,40", *options, "--json") == 0
        shown = capsys.readouterr()
        assert bench(server.url, "--rate", 30, *options[:2], "--slo", "e2e=30") == 0
        table = capsys.readouterr().out
        assert bench(server.url, "--rates", "30,50", *options[:2], "--slo", "e2e=30") == 0
        overview = capsys.readouterr().out
    result = json.loads(shown.out)
    jsonschema.validate(result, RESULT)
    assert [stage["load"]["rate"] for stage in result["stages"]] == [20, 40]
    assert result["knee"]["rate"] is None and result["knee"]["fails_at"] == 20  # one of eight was refused
    assert result["settings"]["requests"] == 8 and result["settings"]["prompts"] == str(prompts)
    assert {request.body["messages"][0]["content"] for request in server.requests[:17]} == {"one", "two"}

    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert [row["rate"] for row in rows] == [20.0] * 8 + [40.0] * 8
    ok = [row for row in rows[:8] if row["outcome"] == "ok"]
    assert max(row["events"][0] - row["due"] for row in ok) == pytest.approx(
        result["stages"][0]["ttft"]["max"], abs=1e-5
    )
    assert sum(row["good"] for row in rows[:8]) == result["stages"][0]["goodput"]["good"]

    assert "first token" in table and "each further token" in table and "e2e ≤ 30 s" in table and "8 of 8" in table
    assert "a p90 takes 29, a p99 takes 299" in table and "knee" not in table
    assert "30/s" in overview and "50/s" in overview and "knee: 50/s" in overview


def test_failures_are_shown_with_what_the_server_said(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(request: Request) -> None:
        code = (429, 500)[request.number % 2]
        await request.reply(code, {"error": {"message": "bu\x1b[2Jsy"}}, "Retry-After: 7")

    with serving(script) as server:
        assert bench(server.url, "--requests", 4, "--rate", 30, "--warmup", 0) == 4  # not a single answer
    shown = capsys.readouterr().out
    assert "2 × refused 429, 2 with Retry-After (bu␛[2Jsy)" in shown and "2 × http error 500 (bu␛[2Jsy)" in shown


def test_a_sweep_finds_what_the_server_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that has four places, in each of which a request stays for 30 ms or a little longer."""

    async def script(request: Request) -> None:
        if server.running > 4:
            await request.reply(429, {})
        else:
            await request.stream(first=0.03)

    with serving(script) as server:
        assert bench(server.url, "--sweep", "--rate", 20, "--requests", 40, "--slo", "ttft=5", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    found = result["knee"]
    # Erlang's loss formula: 10 % find all places taken at 2.05 times their number over 0.03 s, so at 68 a second.
    assert found["rate"] <= 150 and found["rate"] < found["fails_at"] <= 1.11 * found["rate"]
    assert found["share"] >= 0.9 and len(result["stages"]) >= 4


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("load", [("--rate", "20"), ("--concurrency", "2")])
def test_ctrl_c_ends_early_and_reports(load: tuple[str, str]) -> None:
    came = threading.Semaphore(0)

    async def script(request: Request) -> None:
        came.release()
        await request.stream(first=0.0 if request.number < 4 else 60.0)

    with serving(script) as server:
        command = [sys.executable, "-m", "herd", "bench", "serve", server.url, *load, "--duration", "600", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            for _ in range(6):
                assert came.acquire(timeout=60)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    result = json.loads(out)
    jsonschema.validate(result, RESULT)
    stage = result["stages"][0]
    assert result["interrupted"] and stage["interrupted"] and stage["requests"]["unfinished"] >= 1
    assert stage["requests"]["ok"] <= 3 and stage["seconds"]["due"] < 600
    assert any("interrupted" in note for note in result["notes"])
