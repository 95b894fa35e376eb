"""Bounds that keep one request from stopping the others: what is counted unparsed, and what is never begun."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd._native import json_size
from herd.serve import ServeConfig
from herd.serve.api.body import check_size, parse_body
from herd.serve.api.chat import ChatRequest
from herd.serve.errors import ApiError
from herd.serve.server import listen

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(), inside, max_size=4),
    max_leaves=30,
)


def counted(value: Any) -> tuple[int, int, int]:
    """Depth, members and elements after the first one of each list and object."""
    if isinstance(value, str):
        return 0, 1, 0
    if not isinstance(value, list | dict):
        return 0, 0, 0
    inside = [counted(each) for each in (value.values() if isinstance(value, dict) else value)]
    names = len(value) if isinstance(value, dict) else 0
    return (
        1 + max((depth for depth, _, _ in inside), default=0),
        1 + names + sum(members for _, members, _ in inside),
        max(0, len(value) - 1) + sum(elements for _, _, elements in inside),
    )


@given(VALUES, st.sampled_from([None, 2]), st.booleans())
def test_what_a_text_holds_is_counted_without_parsing(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert json_size(text) == counted(value)


@given(st.binary(max_size=64) | st.text('[]{}",\\:a', max_size=64).map(str.encode))
def test_any_bytes_can_be_counted(text: bytes) -> None:
    depth, members, elements = json_size(text)
    assert 0 <= depth <= members <= len(text) and 0 <= elements <= len(text)


def test_counting_is_linear_in_what_is_hardest() -> None:
    """Escaped quotes, and quotes after long runs of backslashes."""
    slashes = b'"' + b"\\" * (1 << 22) + b'"'
    assert json_size(slashes) == (0, 1, 0)
    assert json_size(b'"' + b'\\"' * (1 << 21) + b'",[') == (1, 2, 1)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"prompt": [' + b"[]," * 50_001 + b"[]]}", "too_many_members"),
        (b'{"prompt": [' + b"{}," * 50_001 + b"{}]}", "too_many_members"),
        (b'{"prompt": [' + b'"",' * 50_001 + b'""]}', "too_many_members"),
        (b'{"prompt": [' + b"0," * ((1 << 18) + 1) + b"0]}", "too_many_members"),
        (b'{"prompt": ' + b"[" * 64 + b"]" * 64 + b"}", "too_deep"),
    ],
)
def test_too_much_is_refused_before_it_is_parsed(body: bytes, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_size(body, ServeConfig())
    assert caught.value.code == code


def test_the_largest_honest_requests_pass() -> None:
    config = ServeConfig()
    check_size(orjson.dumps({"prompt": list(range(1 << 18))}), config)
    turn = {"role": "user", "content": '[{"a": [1, 2, 3]}, "quoted"] ' * 60}
    check_size(orjson.dumps({"messages": [turn] * 4096}), config)
    parse_body({"messages": [turn] * 4096}, ChatRequest)


def test_unknown_names_are_named_where_they_are() -> None:
    good = {"role": "user", "content": "x"}
    for body, param in (
        ({"messages": [good], "mesages": 1}, "mesages"),
        ({"messages": [good, {**good, "colour": 1}]}, "messages.1.colour"),
        ({"messages": [good], "response_format": {"type": "text", "x": 1}}, "response_format.x"),
    ):
        with pytest.raises(ApiError) as caught:
            parse_body(body, ChatRequest)
        assert (caught.value.code, caught.value.param) == ("unknown_parameter", param)


def test_a_text_that_cannot_fit_is_not_made_into_tokens(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The context is 512 tokens."""
    tokenizer = served.registry.loaded[0].llm.tokenizer
    long = "x " * 5000
    lengths: list[int] = []
    encode = type(tokenizer).encode
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, text: lengths.append(len(text)) or encode(self, text))
    with served.client() as client:
        for path, body in (
            ("/v1/completions", {"prompt": long}),
            ("/v1/completions", {"prompt": ["x", long]}),
            ("/v1/embeddings", {"input": long}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
            ("/v1/messages", {"messages": [{"role": "user", "content": long}], "max_tokens": 2}),
        ):
            response = client.post(path, json=body)
            assert response.status_code == 400, (path, response.text)
            assert response.json()["error"]["code"] == "context_length_exceeded"
            assert "512" in response.json()["error"]["message"]
    assert max(lengths, default=0) < len(long)


def test_pieces_of_a_tokenised_text(served: Any) -> None:
    with served.client() as client:
        ids = client.post("/tokenize", json={"content": "héllo there"}).json()["tokens"]
        pieces = client.post("/tokenize", json={"content": "héllo there", "with_pieces": True}).json()["tokens"]
        assert [piece["id"] for piece in pieces] == ids
        empty = client.post("/tokenize", json={"content": "", "with_pieces": True}).json()
        assert empty == {"tokens": []}


def test_small_writes_do_not_wait_for_each_other() -> None:
    """Nagle's algorithm would hold each token back until the client has acknowledged the one before: 40 ms."""

    async def option() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        class Noting(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                raw = transport.get_extra_info("socket")
                accepted.set_result(raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                transport.close()

        bound = listen(ServeConfig(port=0))
        server = await asyncio.get_running_loop().create_server(Noting, sock=bound)
        _, writer = await asyncio.open_connection(*bound.getsockname()[:2])
        try:
            return await accepted
        finally:
            writer.close()
            server.close()

    assert asyncio.run(option()) != 0


def test_connections_that_say_nothing_make_way(serving: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.serve.server.Connection.most", 20)
    with serving({"tiny": model_path}) as found:
        host, port = found.url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port)), timeout=20) for _ in range(60)]
        try:
            with found.client() as client:
                assert client.get("/health").status_code == 200
            cut = 0
            for raw in idle:
                raw.setblocking(False)
                try:
                    cut += raw.recv(1) == b""
                except ConnectionResetError:
                    cut += 1
                except BlockingIOError:
                    pass
            assert 40 <= cut <= 42
        finally:
            for raw in idle:
                raw.close()
