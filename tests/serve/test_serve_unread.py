"""Clients that do not read: what waits for them is bounded in size and time, and they keep nobody else out."""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from herd.serve import Keys, ServeConfig
from herd.serve.server import Connection
from tests.serve.live_server import Served, until

ENDLESS = {"max_tokens": 60, "ignore_eos": True, "seed": 5}
LONG_CHAT = {**ENDLESS, "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 20, "n": 4}


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system takes little of what nobody reads."""
    monkeypatch.setattr("herd.serve.server._KERNEL_BUFFER", 4096)


def connections(served: Served) -> list[Connection]:
    """Those that are open on the server's side, closing ones included."""
    return [each for each in served.server.server_state.connections if isinstance(each, Connection)]


def deaf(served: Served, data: bytes = b"", buffer: int = 2048) -> socket.socket:
    """A connection whose client can take very little, and has sent something."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    raw.settimeout(5)
    raw.connect(served.address)
    raw.sendall(data)
    return raw


def post(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data


def fill(raw: socket.socket, request: bytes, most: int = 40_000_000) -> None:
    """Send one request after the other without reading, until the server takes no more."""
    raw.settimeout(0.2)
    sent = 0
    try:
        while sent < most:
            sent += raw.send(request * 200)
    except OSError:
        return
    raise AssertionError("the server takes requests whose answers nobody reads without end")


def test_who_sends_and_never_reads_makes_way(serving: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key, with more connections than there may be, and a patience that no test waits for."""
    monkeypatch.setattr(Connection, "most", 6)
    request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving({"tiny": model_path}, ServeConfig(port=0), Keys(["a-real-key"])) as served:
        held = [deaf(served) for _ in range(6)]
        try:
            for raw in held:
                fill(raw, request)
            until(lambda: all(each.flow.write_paused for each in connections(served)))
            for _ in range(5):
                with served.client() as client:
                    assert client.get("/health").status_code == 200
            assert len(connections(served)) <= 6
        finally:
            for raw in held:
                raw.close()


def test_who_reads_nothing_is_cut(serving: Any, model_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Streams, whole answers, refusals, and a connection that is being closed; none of them leaves anything behind."""
    config = ServeConfig(port=0, write_timeout=0.5)
    request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving({"tiny": model_path}, config) as served, caplog.at_level(logging.WARNING):
        held = [
            deaf(served, post("/v1/chat/completions", {**LONG_CHAT, "stream": True})),
            deaf(served, post("/v1/chat/completions", LONG_CHAT)),
            deaf(served, post("/v1/completions", {**ENDLESS, "prompt": "x", "logprobs": 20, "n": 4})),
            deaf(served),
        ]
        try:
            fill(held[3], request)
            until(lambda: len(connections(served)) == 4)
            until(lambda: not connections(served), 60)
            until(served.is_free)
        finally:
            for raw in held:
                raw.close()
        with served.client() as client:
            page = client.get("/metrics").text
        ends = re.findall(r'herd_streams_total\{end="(\w+)",path="/v1/chat/completions"\} 1.0', page)
        assert ends == ["unread"]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_who_reads_slowly_gets_all_of_it(serving: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than the patience for all of it, and less for each part."""
    monkeypatch.setattr(Connection, "least_rate", 1000)  # with buffers as small as here, a connection may be very slow
    config = ServeConfig(port=0, write_timeout=2.0)
    with serving({"tiny": model_path}, config) as served:
        with served.client() as client:
            whole = len(client.post("/v1/chat/completions", json=LONG_CHAT).content)
        # Not the smallest buffer: with that, TCP waits for seconds before it asks whether there is room again.
        with deaf(served, post("/v1/chat/completions", LONG_CHAT), buffer=16 << 10) as raw:
            raw.settimeout(60)
            start, read, most = time.monotonic(), 0, 0
            while read < whole:
                part = raw.recv(1 << 16)
                assert part, "it was cut"
                read += len(part)
                most = max([most, *(each.transport.get_write_buffer_size() for each in connections(served))])
                ahead = read / whole * 4 - (time.monotonic() - start)
                if read > len(part) and ahead > 0:
                    time.sleep(ahead)
            assert time.monotonic() - start > 3.0 and most > 0
