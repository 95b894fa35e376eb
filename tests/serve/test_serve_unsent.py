"""Answers count until they have been sent: for the places of their key, and for the bytes it may have on its way."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from herd.engine.request import Completion
from herd.serve import Keys, ServeConfig
from herd.serve.bodies import Answers, Bytes
from herd.serve.errors import ApiError
from herd.serve.keys import StoredKey
from herd.serve.server import Connection
from tests.serve.live_server import Served, until

KEY = "a-key-with-one-place"
TEXTS = {"input": ["a b c"] * 256, "encoding_format": "float"}


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system takes little of what nobody reads."""
    monkeypatch.setattr("herd.serve.server._KERNEL_BUFFER", 4096)


@pytest.fixture(scope="module")
def wide(make_model: Any) -> Path:
    """Its vectors make long answers."""
    found: Path = make_model(dim=1024, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=32)
    return found


def keys(**limits: Any) -> Keys:
    return Keys(stored={"ann": StoredKey(sha256=hashlib.sha256(KEY.encode()).hexdigest(), **limits)})


def client_of(served: Served) -> Any:
    return served.client(headers={"authorization": f"Bearer {KEY}"})


def answered(raw: socket.socket) -> int:
    """The status of an answer that is read no further."""
    raw.settimeout(60)
    return int(raw.recv(20).split()[1])


def test_an_answer_holds_its_place_until_it_is_sent(serving: Any, wide: Path) -> None:
    with serving({"wide": wide}, keys=keys(concurrent=1)) as served, client_of(served) as client:
        with served.post("/v1/embeddings", TEXTS, KEY) as raw:
            assert answered(raw) == 200
            until(lambda: served.registry.loaded[0].users == 0)  # the model is free to go
            for _ in range(3):
                refused = client.post("/v1/embeddings", json={"input": "x"})
                assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
                time.sleep(0.05)
        until(lambda: client.post("/v1/embeddings", json={"input": "x"}).status_code == 200)
        for _ in range(5):  # who has all of an answer may ask again at once
            assert client.post("/v1/embeddings", json=TEXTS).status_code == 200


def test_a_kept_response_holds_its_place_too(serving: Any, model_path: Path, tmp_path: Path) -> None:
    config = ServeConfig(port=0, store=tmp_path / "kept.db")
    with serving({"tiny": model_path}, config, keys(concurrent=1)) as served, client_of(served) as client:
        items = [{"role": "user", "content": "x" * 6000}] * 100
        made = client.post("/v1/responses", json={"input": [*items, {"role": "user", "content": "y"}]})
        assert made.status_code == 400  # too long for the context: asked for with truncation it is kept
        turns = [turn for item in items for turn in (item, {"role": "assistant", "content": ""})]
        body = {"input": [*turns, {"role": "user", "content": "y"}], "truncation": "auto", "max_output_tokens": 2}
        made = client.post("/v1/responses", json=body)
        assert made.status_code == 200, made.text
        path = f"/v1/responses/{made.json()['id']}/input_items?limit=100"
        until(lambda: client.get(path).status_code == 200)
        with socket.create_connection(served.address, timeout=60) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
            assert answered(raw) == 200
            assert client.get(path).status_code == 429
        until(lambda: client.get(path).status_code == 200)


def test_answers_that_nobody_reads_are_bounded(serving: Any, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may have 5.8 MB; of 32 MiB a key has half."""
    monkeypatch.setattr("herd.serve.bodies._ANSWERS", 32 << 20)
    with serving({"wide": wide}, keys=keys()) as served, client_of(served) as client:
        held = [served.post("/v1/embeddings", TEXTS, KEY) for _ in range(8)]
        assert sorted(answered(raw) for raw in held) == [200] * 2 + [429] * 6
        refused = client.post("/v1/embeddings", json=TEXTS)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "too_many_bytes"
        assert client.post("/v1/embeddings", json={**TEXTS, "encoding_format": "base64"}).status_code == 200
        for raw in held:
            raw.close()
        until(lambda: client.post("/v1/embeddings", json=TEXTS).status_code == 200)
        until(lambda: served.app._app.state.answers._held.total() == 0)


def test_an_answer_that_never_could_be_sent_is_refused(
    serving: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("herd.serve.bodies._ANSWERS", 2 << 20)
    with serving({"tiny": model_path}) as served, served.client() as client:
        ids = [[1 + i % 500 for i in range(400)]] * 16
        body = {"prompt": ids, "echo": True, "logprobs": 20, "max_tokens": 0}
        refused = client.post("/v1/completions", json=body)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["code"]) == (400, "logprobs", "answer_too_large")
        assert client.post("/v1/completions", json={**body, "logprobs": 1}).status_code == 200
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "logprobs": True, "n": 16}
        refused = client.post("/v1/chat/completions", json={**chat, "top_logprobs": 20})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "top_logprobs"
        until(served.is_free)
        assert client.post("/v1/chat/completions", json={**chat, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(("path", "asks"), [("chat/completions", "top_logprobs"), ("completions", "logprobs")])
def test_streams_that_nobody_reads_are_bounded(
    serving: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, asks: str
) -> None:
    """Each keeps 1.3 MB of log-probabilities at most; of 4 MiB a key has half."""
    monkeypatch.setattr("herd.serve.bodies._ANSWERS", 4 << 20)
    body: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True, "n": 4, asks: 20, "stream": True}
    body |= (
        {"prompt": "x"} if asks == "logprobs" else {"messages": [{"role": "user", "content": "x"}], "logprobs": True}
    )
    with serving({"tiny": model_path}) as served:
        held = [served.post(f"/v1/{path}", body) for _ in range(3)]
        assert sorted(answered(raw) for raw in held) == [200, 429, 429]
        for raw in held:
            raw.close()
        until(served.is_free)
        until(lambda: served.app._app.state.answers._held.total() == 0)
        with served.client() as client:
            assert client.post(f"/v1/{path}", json={**body, "max_tokens": 2}).text.endswith("data: [DONE]\n\n")
            refused = client.post(f"/v1/{path}", json={**body, "max_tokens": 400})
            error = refused.json()["error"]
            assert (refused.status_code, error["param"], error["code"]) == (400, asks, "answer_too_large")
        until(served.is_free)


def test_bytes_of_a_key_and_of_all() -> None:
    found = Bytes("answers", 100)
    found.hold("ann", 50)
    with pytest.raises(ApiError, match="this key's answers") as mine:
        found.hold("ann", 1)
    assert mine.value.status == 429
    found.hold("bob", 40)
    with pytest.raises(ApiError, match="all answers") as all_of_them:
        found.hold("eve", 20)
    assert all_of_them.value.status == 503
    found.free("ann", 50)
    found.hold("eve", 20)
    assert Answers().most_of_one >= 64 << 20


def test_who_takes_a_trickle_is_cut(serving: Any, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes some in every second, less than it must."""
    monkeypatch.setattr(Connection, "least_rate", 2_000_000)
    config = ServeConfig(port=0, write_timeout=1.0)
    with serving({"wide": wide}, config) as served:
        open_ones = served.server.server_state.connections
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            raw.settimeout(20)
            raw.connect(served.address)
            data = json.dumps(TEXTS).encode()
            head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            raw.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
            read, start = len(raw.recv(2048)), time.monotonic()
            while open_ones:
                assert time.monotonic() - start < 20, "it was not cut"
                read += len(raw.recv(1 << 14))
                time.sleep(0.05)  # 300 kB/s
        assert read < 4_000_000


def test_vectors_are_the_same_in_both_forms(serving: Any, wide: Path) -> None:
    with serving({"wide": wide}) as served, served.client() as client:
        body = {"input": ["one text", "and another"]}
        plain, packed = (
            client.post("/v1/embeddings", json={**body, "encoding_format": f}) for f in ("float", "base64")
        )
        assert plain.headers["content-type"] == "application/json"
        numbers = [each["embedding"] for each in plain.json()["data"]]
        raw = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in packed.json()["data"]]
        assert np.array_equal(np.array(numbers, np.float32), np.stack(raw))
        assert np.array_equal(np.stack(raw), served.llm.embed(body["input"], normalise=True))
        assert [each["index"] for each in plain.json()["data"]] == [0, 1]
        assert plain.json()["usage"] == packed.json()["usage"] and plain.json()["object"] == "list"


def test_long_vectors_hold_up_nobody(serving: Any, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They become JSON beside the event loop."""
    threads: list[str] = []
    import orjson

    from herd.serve.api import tokens

    class Watched:
        def dumps(self, data: Any) -> bytes:
            threads.append(threading.current_thread().name)
            return orjson.dumps(data)

    monkeypatch.setattr(tokens, "orjson", Watched())
    with serving({"wide": wide}) as served, served.client() as client:
        assert client.post("/v1/embeddings", json=TEXTS).status_code == 200
    assert len(threads) > 200 and all(name.startswith("herd-texts") for name in threads)


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many completions there are each time a choice is written."""
    import gc

    from herd.serve.api.completions import _Answer

    found: list[int] = []
    write = _Answer._choice

    def counting(self: Any, *arguments: Any) -> Any:
        found.append(sum(isinstance(each, Completion) for each in gc.get_objects()))
        return write(self, *arguments)

    monkeypatch.setattr(_Answer, "_choice", counting)
    yield found


def test_scored_prompts_are_dropped_as_they_are_written(serving: Any, model_path: Path, alive: list[int]) -> None:
    with serving({"tiny": model_path}, ServeConfig(port=0, max_running=2)) as served, served.client() as client:
        ids = [[1 + (i * j) % 500 for i in range(300)] for j in range(1, 31)]
        body = {"prompt": ids, "echo": True, "logprobs": 5, "max_tokens": 0}
        answer = client.post("/v1/completions", json=body).json()
    assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [300] * 30
    assert answer["usage"]["prompt_tokens"] == 9000
    assert max(alive[-5:]) < 15, alive  # 30 if all were kept until the end
