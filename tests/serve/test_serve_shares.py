"""What one key does beside the event loop does not keep another key's out, and ends with whoever asked for it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from herd.errors import ResourceError
from herd.serve import Keys, ServeConfig
from herd.serve.pools import Pool
from tests.serve.live_server import until

ALICE, BOB = "alice-has-a-key", "bob-has-a-key"


def test_a_key_has_its_share_of_the_threads() -> None:
    go = threading.Event()
    at_once: list[int] = []
    running: list[str] = []

    def work() -> None:
        running.append("alice")
        at_once.append(len(running))
        go.wait(20)
        running.remove("alice")

    async def both() -> str:
        pool = Pool("test", threads=3, share=2)
        mine = [asyncio.create_task(pool.run("alice", work)) for _ in range(6)]
        await asyncio.sleep(0.05)
        assert len(running) == 2
        found = await asyncio.wait_for(pool.run("bob", lambda: "bob's"), 5)
        mine[0].cancel()  # its thread goes on: no other one of hers may begin before that has ended
        mine[5].cancel()  # it waits: it never begins
        await asyncio.sleep(0.05)
        assert len(at_once) == 2
        go.set()
        done = await asyncio.gather(*mine, return_exceptions=True)
        assert [isinstance(each, asyncio.CancelledError) for each in done] == [True, *[False] * 4, True]
        pool.close()
        return found

    assert asyncio.run(both()) == "bob's"
    assert max(at_once) == 2 and len(at_once) == 5


def test_grammars_of_one_key_are_not_in_anothers_way(
    serving: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of clients that have gone are not compiled."""
    with serving({"tiny": model_path}, keys=Keys([ALICE, BOB])) as found:
        compiled: list[str] = []
        limit = type(found.llm).max_tokens

        def slow(self: Any, prompt: Any, sampling: Any) -> Any:
            if sampling.grammar is not None and sampling.grammar.text.startswith("a"):
                compiled.append(sampling.grammar.text)
                time.sleep(0.3)
            return limit(self, prompt, sampling)

        monkeypatch.setattr(type(found.llm), "max_tokens", slow)
        gone = []
        for i in range(20):
            wanted = {"type": "regex", "grammar": f"a{{{i + 1}}}"}
            gone.append(found.post("/v1/completions", {"prompt": "x", "response_format": wanted}, ALICE))
        until(lambda: len(compiled) == 1)
        for raw in gone:
            raw.close()
        start = time.perf_counter()
        with found.client(headers={"authorization": f"Bearer {BOB}"}) as client:
            body_of_bob = {"prompt": "x", "max_tokens": 8, "response_format": {"type": "regex", "grammar": "[b-f]{3}"}}
            assert client.post("/v1/completions", json=body_of_bob).status_code == 200
        assert time.perf_counter() - start < 3  # 6 s if all were compiled
        until(lambda: found.registry.loaded[0].users == 0)
        assert len(compiled) <= 3


def test_bodies_that_do_not_come_make_way(serving: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.serve.server.Connection.most", 20)
    with serving({"tiny": model_path}, ServeConfig(port=0, body_timeout=60)) as found:
        slow = []
        for _ in range(40):
            raw = socket.create_connection(found.address, timeout=20)
            raw.sendall(
                b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
            )
            slow.append(raw)
        for _ in range(3):
            with found.client() as client:
                assert client.get("/health").status_code == 200
        for raw in slow:
            raw.close()


def test_texts_without_bounds_are_bounded(served: Any) -> None:
    """The context is 512 tokens; a text of 16 characters a token cannot fit."""
    long = "x " * (1 << 16)
    with served.client() as client:
        turns = [{"role": "user", "content": "x " * (1 << 18)}] * 3
        refused = client.post("/tokenize", json={"messages": turns})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages"
        items = [
            {"role": "user", "content": long},
            {"role": "assistant", "content": "y"},
            {"role": "user", "content": "z"},
        ]
        cut = client.post("/v1/responses", json={"input": items, "truncation": "auto", "max_output_tokens": 2})
        assert cut.status_code == 200, cut.text
        assert [item["input_index"] for item in cut.json()["dropped_items"]] == [0, 1]
        whole = client.post("/v1/responses", json={"input": long, "truncation": "auto", "max_output_tokens": 2})
        assert whole.status_code == 400 and whole.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "schema", [{"type": "array", "maxItems": 0}, {"type": ["object", "string"]}, {"type": "string"}]
)
def test_parameters_of_a_function_are_an_object(served: Any, schema: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [tool], "tool_choice": "required"}
    with served.client() as client:
        refused = client.post("/v1/chat/completions", json=body).json()["error"]
        assert refused["param"] == "tools.0.function.parameters"


def test_alternatives_of_parameters_are_objects_too(served: Any) -> None:
    schema = {"anyOf": [{"type": "string"}, {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [tool],
        "tool_choice": "required",
        "max_tokens": 60,
    }
    with served.client() as client:
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "f"


def test_what_decides_about_bits_is_in_the_fingerprint(serving: Any, model_path: Path) -> None:
    found = []
    for loading in ({"backend": "torch"}, {"backend": "torch", "quant": "bf16"}, {}):
        with serving({"tiny": model_path}, **loading) as served:
            found.append((served.registry.loaded[0].fingerprint, served.llm.backend.identity))
    assert len({fingerprint for fingerprint, _ in found}) == 3
    assert "float32" in found[0][1] and "bfloat16" in found[1][1]


def test_a_gpu_that_is_too_small_is_left_alone(model_path: Path, serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.engine.backend._gpu_is_there", lambda: True)

    def full(options: Any) -> None:
        raise ResourceError("the GPU is full")

    monkeypatch.setattr("herd.engine.torch_backend.open_backend", full)
    with serving({"tiny": model_path}) as served:
        assert "native" in served.llm.backend.identity
