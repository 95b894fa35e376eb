"""A time limit holds from the call's first moment on; what can never be served is told apart from what may be later."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from herd.serve import ServeConfig
from herd.serve.api.messages import _loaded
from herd.serve.replicas.link import ReplicaLost
from herd.serve.replicas.relay import Relay
from herd.serve.replicas.replica import Part
from tests.serve.live_server import memory_for, until

PATH = "/v1/completions"
TURN = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (PATH, {"prompt": "x", "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": TURN, "max_tokens": 2}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 2}),
        ("/v1/messages", {"messages": TURN, "max_tokens": 2}),
        ("/v1/embeddings", {"input": "x"}),
    ],
)
def test_a_timeout_holds_before_the_queue(
    served: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    """Here the key's share of the threads for texts is taken by longer ones."""
    go, busy = threading.Event(), list[str]()
    encode = served.llm.tokenizer.encode

    def slow(text: str, *more: Any, **options: Any) -> Any:
        if text == "slow":
            busy.append(text)
            go.wait(20)
        return encode(text, *more, **options)

    monkeypatch.setattr(served.llm.tokenizer, "encode", slow)
    held = [served.post("/tokenize", {"content": "slow"}) for _ in range(2)]
    try:
        until(lambda: len(busy) == 2)
        with served.client() as client:
            start = time.perf_counter()
            late = client.post(path, json={**body, "timeout": 0.2})
            assert time.perf_counter() - start < 2
            assert late.status_code == 400 and late.json()["error"]["code"] == "timeout_exceeded"
            go.set()
            assert client.post(path, json={**body, "timeout": 20}).status_code == 200
    finally:
        go.set()
        for raw in held:
            raw.close()
    until(lambda: served.registry.loaded[0].users == 0)


def test_a_timeout_holds_while_a_model_is_loaded(
    serving: Any, model_path: Path, other_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving({"tiny": model_path, "other": other_path}) as served, served.client() as client:
        go = threading.Event()
        monkeypatch.setattr("herd.serve.registry._fingerprint", lambda *given: str(go.wait(10)))
        body = {"model": "other", "prompt": "x", "max_tokens": 2}
        start = time.perf_counter()
        late = client.post(PATH, json={**body, "timeout": 0.1})
        assert time.perf_counter() - start < 5
        go.set()
        assert late.status_code == 400 and late.json()["error"]["code"] == "timeout_exceeded"
        assert client.post(PATH, json=body).status_code == 200  # it was loaded in spite of that


@pytest.mark.parametrize("room", [0, 4])
def test_more_prompts_than_may_wait_never_fit(serving: Any, model_path: Path, room: int) -> None:
    with serving({"tiny": model_path}, ServeConfig(port=0, max_queue=room)) as served, served.client() as client:
        most = max(1, room)
        fits = client.post(PATH, json={"prompt": ["x"] * most, "max_tokens": 2})
        assert fits.status_code == 200 and len(fits.json()["choices"]) == most
        refused = client.post(PATH, json={"prompt": ["x"] * (most + 1), "max_tokens": 2})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"
        assert str(most) in refused.json()["error"]["message"]


def test_traffic_on_one_model_does_not_keep_another_from_loading(
    serving: Any, model_path: Path, other_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig(port=0, memory=int(1.5 * memory_for(model_path)))
    monkeypatch.setattr("herd.serve.registry._PATIENCE", 60.0)  # three answers of a busy machine take longer than usual
    with serving({"tiny": model_path, "other": other_path}, config) as served, served.client() as client:
        stop, statuses = threading.Event(), list[int]()

        def use() -> None:
            body = {"model": "tiny", "prompt": "x", "max_tokens": 200, "ignore_eos": True}
            with served.client() as mine:
                while not stop.is_set():
                    statuses.append(mine.post(PATH, json=body).status_code)

        with ThreadPoolExecutor(3) as pool:
            for _ in range(3):
                pool.submit(use)
            until(lambda: len(statuses) > 5)
            found = client.post(PATH, json={"model": "other", "prompt": "x", "max_tokens": 2})
            more = len(statuses) + 6
            until(lambda: len(statuses) > more)  # the one that made way comes back
            stop.set()
        assert found.status_code == 200 and set(statuses) == {200}
        # One whose answers are too long to wait for is in use, and others' requests go on meanwhile.
        monkeypatch.setattr("herd.serve.registry._PATIENCE", 0.3)
        assert client.post(PATH, json={"model": "tiny", "prompt": "x", "max_tokens": 2}).status_code == 200
        until(served.is_free)
        with served.paused():
            busy = served.post(PATH, {"model": "tiny", "prompt": "x", "max_tokens": 2})
            until(lambda: served.driver.running == 1)
            refused = client.post(PATH, json={"model": "other", "prompt": "x", "max_tokens": 2})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "models_in_use"
            assert int(refused.headers["retry-after"]) >= 1
        busy.close()


def test_arguments_deeper_than_python_goes_are_given_as_they_are() -> None:
    deep = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
    assert _loaded(deep) == {"unfinished": deep}
    assert _loaded('{"a": [1]}') == {"a": [1]}


def test_a_client_that_has_gone_of_a_lost_replica_either() -> None:
    """The last event of its stream cannot be sent: that ends the response, without an error."""

    class Lost:
        async def next(self) -> Part:
            raise ReplicaLost

    head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
    closed, sent = list[int](), list[Any]()

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            raise ConnectionResetError

    async def receive() -> Any:
        await asyncio.sleep(30)

    async def answer() -> None:
        relay = Relay(Lost(), Part(1, (head,)), lambda: closed.append(1))  # type: ignore[arg-type]
        await asyncio.wait_for(relay({"type": "http", "path": "/v1/messages"}, receive, send), 10)

    asyncio.run(answer())
    assert closed == [1] and len(sent) == 2
