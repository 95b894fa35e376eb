"""What a review of the server found, each in the situation where it showed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import resource
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from herd.errors import UsageError
from herd.serve import Keys, ServeConfig, read_keys
from herd.serve.api.body import check_size, parse_body
from herd.serve.api.chat import ChatRequest
from herd.serve.api.completions import CompletionRequest
from herd.serve.errors import ApiError
from herd.serve.keys import Client, KeyLimits
from tests.serve.live_server import memory_for, until


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [-1] * 1_000_000}),
        (CompletionRequest, {"prompt": [[-1] * 1_000_000]}),
        (CompletionRequest, {"prompt": ["x", *[1] * 1_000_000]}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * 1_000_000}]}),
        (ChatRequest, {"messages": [{}] * 1_000_000}),
        (ChatRequest, {str(i): 1 for i in range(500_000)}),
    ],
)
def test_a_million_mistakes_cost_no_more_than_one(kind: Any, body: dict[str, Any]) -> None:
    """pydantic would keep an error for each: 40 s and 7 GB."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ApiError):
        check_size(orjson.dumps(body), ServeConfig())
        parse_body(body, kind)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10


def test_an_empty_key_is_nobodys(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"ann": {"sha256": hashlib.sha256(b"").hexdigest()}}))
    with pytest.raises(UsageError, match="empty"):
        read_keys(file)
    assert Keys(["a-real-key"]).find({b"authorization": b"Bearer "}) is None


def test_work_between_steps_ends_with_the_model(serving: Any, model_path: Path) -> None:
    """Whoever waits for it is told; nobody waits for ever. And it counts as work."""
    with serving({"tiny": model_path}) as served:
        driver, go = served.driver, threading.Event()

        def work() -> Any:
            yield
            return go.wait(30)

        def begun(text: list[int]) -> Any:
            pieces = work()
            next(pieces)
            return pieces

        async def ask() -> list[Any]:
            first = asyncio.create_task(driver.between_steps(begun, [[1]], Client("ann", KeyLimits())))
            await asyncio.sleep(0.05)
            second = asyncio.create_task(driver.between_steps(begun, [[1]], Client("ann", KeyLimits())))
            await asyncio.sleep(0.05)
            assert not driver.idle
            stopping = threading.Thread(target=driver.stop, args=(ApiError(503, "stops"),))
            stopping.start()
            await asyncio.sleep(0.05)
            go.set()
            found = await asyncio.wait_for(asyncio.gather(first, second, return_exceptions=True), 20)
            stopping.join()
            return found

        first, second = asyncio.run(ask())
        assert first == [True] and isinstance(second, ApiError)


def test_a_thread_that_fails_says_so(serving: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"tiny": model_path}) as served, served.client() as client:
        driver = served.driver
        body = {"prompt": "x", "max_tokens": 2}
        assert client.post("/v1/completions", json=body).status_code == 200

        def broken() -> None:
            raise MemoryError("no more pages")

        monkeypatch.setattr(driver.llm.scheduler, "admit", broken)
        for _ in range(2):
            failed = client.post("/v1/completions", json=body)
            assert failed.status_code == 503 and "pages" not in failed.text
        assert not driver.alive and client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200


def test_a_model_with_a_user_is_not_unloaded(serving: Any, model_path: Path, other_path: Path) -> None:
    """From when a request has it, its prompt not yet in the queue."""
    config = ServeConfig(port=0, memory=int(1.5 * memory_for(model_path)))
    with serving({"tiny": model_path, "other": other_path}, config) as served, served.client() as client:
        tokenizer, go, inside = served.llm.tokenizer, threading.Event(), threading.Event()
        encode = tokenizer.encode

        def slowly(text: str) -> list[int]:
            inside.set()
            go.wait(30)
            return list(encode(text))

        tokenizer.encode = slowly
        statuses: list[int] = []

        def ask() -> None:
            with served.client() as own:
                statuses.append(own.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        assert inside.wait(30)
        assert client.post("/v1/completions", json={"model": "other", "prompt": "x"}).status_code == 503
        go.set()
        asking.join()
        assert statuses == [200]
        assert client.post("/v1/completions", json={"model": "other", "prompt": "x"}).status_code == 200


def test_tokens_count_for_who_leaves_before_the_end(serving: Any, model_path: Path) -> None:
    keys = Keys(["a-real-key"])
    _, client_of_key = keys._clients[0]
    limited = Client("key", KeyLimits(tokens_per_minute=1000))
    keys._clients[0] = (keys._clients[0][0], limited)
    assert client_of_key.limits.tokens_per_minute is None
    with serving({"tiny": model_path}, keys=keys) as served:
        with served.client(headers={"authorization": "Bearer a-real-key"}) as client:
            body = {"prompt": "def f(x): " * 9, "max_tokens": 300, "ignore_eos": True, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        until(lambda: limited.running == 0)
        assert limited._tokens is not None and limited._tokens.level < 1000 - 20


def test_a_crowd_of_one_key_gives_way(serving: Any, model_path: Path) -> None:
    """A full queue refuses whoever has most of it."""
    keys = Keys(["greedy-greedy", "modest-modest"])
    with serving({"tiny": model_path}, ServeConfig(port=0, max_running=1, max_queue=4), keys) as served:
        statuses: dict[str, list[int]] = {"greedy": [], "modest": []}

        def ask(name: str) -> None:
            with served.client(headers={"authorization": f"Bearer {name}-{name}"}) as client:
                body = {"prompt": "x", "max_tokens": 2}
                statuses[name].append(client.post("/v1/completions", json=body).status_code)

        threads = [threading.Thread(target=ask, args=("greedy",)) for _ in range(5)]
        with served.paused():
            for waiting, thread in enumerate(threads):
                thread.start()
                until(lambda waiting=waiting: served.driver.running + served.driver.waiting == waiting + 1)  # type: ignore[misc]
            ask_modest = threading.Thread(target=ask, args=("modest",))
            ask_modest.start()
            until(lambda: statuses["greedy"] == [429])
        for thread in [*threads, ask_modest]:
            thread.join()
        assert statuses["modest"] == [200] and sorted(statuses["greedy"]) == [200] * 4 + [429]


def test_a_model_that_cannot_be_loaded(model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A 503 without what is the operator's business, which the log has once, and no second try at once."""
    from herd.serve import Registry

    async def ask() -> None:
        registry = Registry({"broken": tmp_path / "secret-place"}, ServeConfig(), {})
        for _ in range(3):
            with pytest.raises(ApiError) as caught:
                await registry.get("broken")
            assert caught.value.status == 503 and "secret-place" not in str(caught.value)
        assert caught.value.code == "load_failed"

    asyncio.run(ask())
    assert [text for text in caplog.messages if "secret-place" in text] == caplog.messages and len(caplog.messages) == 1
