"""Places in the batch and room in the cache, between keys, and between answers and texts to embed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from herd.engine.paged_cache import PagedCache
from herd.serve import Keys, ServeConfig
from tests.serve.live_server import Served, until

ANN, BOB = "ann-has-a-key", "bob-has-a-key"
PATH = "/v1/completions"
LONG = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "seed": 1}


def slow_steps(served: Served, seconds: float) -> list[int]:
    """Each step takes so long; how many sequences went on in each, as they come."""
    backend, sizes = served.llm.backend, list[int]()
    step = backend.step

    def slowly(spans: Any) -> Any:
        sizes.append(len(spans))
        time.sleep(seconds)
        return step(spans)

    backend.step = slowly
    return sizes


def test_embeddings_of_one_key_let_anothers_answer_go_on(serving: Any, model_path: Path) -> None:
    """Where they do not fit into the cache together, with several texts always waiting: both go on."""
    with serving({"tiny": model_path}, keys=Keys([ANN, BOB]), ctx=512, page_tokens=16) as served:
        backend, stop, done = served.llm.backend, threading.Event(), list[int]()
        backend._pages = PagedCache(40, 16, backend._copy_page, 32)  # 640 tokens; 500 of them are a text's
        driver: Any = served.driver
        driver._learn = lambda tokens, seconds: None  # prompts and texts enter in pieces of 64
        driver._prompt_speed = 1.0

        def embed() -> None:
            with served.client(headers={"authorization": f"Bearer {ANN}"}) as client:
                while not stop.is_set():
                    done.append(client.post("/v1/embeddings", json={"input": [7] * 500}).status_code)

        def ask(**more: Any) -> Any:
            with served.client(headers={"authorization": f"Bearer {BOB}"}) as client:
                return client.post(PATH, json={**LONG, "prompt": list(range(5, 305)), "max_tokens": 200, **more})

        alone = ask().json()["choices"][0]["text"]
        with ThreadPoolExecutor(3) as pool:
            texts = [pool.submit(embed) for _ in range(3)]
            until(lambda: len(done) > 2)
            before = len(done)
            beside = ask(timeout=15)
            after = len(done)
            stop.set()
        assert beside.status_code == 200 and beside.json()["choices"][0]["text"] == alone
        assert after > before and set(done) == {200}
        assert all(text.exception() is None for text in texts)
        until(served.is_free)


@pytest.mark.parametrize("keys", [[ANN], [ANN, BOB]])
def test_one_key_does_not_take_all_places(serving: Any, model_path: Path, keys: list[str]) -> None:
    with serving({"tiny": model_path}, ServeConfig(port=0, max_running=4), Keys(keys)) as served:
        slow_steps(served, 0.01)
        held = [served.post(PATH, LONG, ANN) for _ in range(8)]
        places = 5 - len(keys)  # all of them where nobody else has a key
        until(lambda: served.driver.running == places and served.driver.waiting == 8 - places)
        if len(keys) > 1:
            with served.client(headers={"authorization": f"Bearer {BOB}"}) as client:
                assert client.post(PATH, json={**LONG, "max_tokens": 1}).status_code == 200
            assert served.driver.waiting == 5  # none of hers has ended meanwhile
        for raw in held:
            raw.close()
        until(served.is_free)


def test_no_more_answers_go_on_than_there_are_places(serving: Any, model_path: Path) -> None:
    """Several to a prompt too, and of a prompt with more of them than places; none waits for ever."""
    body = {**LONG, "max_tokens": 30}
    with serving({"tiny": model_path}) as served, served.client() as client:
        wanted = {n: client.post(PATH, json={**body, "n": n}).json()["choices"] for n in (1, 3, 6)}
    with serving({"tiny": model_path}, ServeConfig(port=0, max_running=4)) as served:
        sizes = slow_steps(served, 0.002)

        def ask(n: int) -> bool:
            with served.client() as client:
                return bool(client.post(PATH, json={**body, "n": n}).json()["choices"] == wanted[n])

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, [3, 1, 6, 3, 1, 3, 1, 1]))
        assert max(sizes) == 4


def test_who_would_wait_for_a_place_too_long_is_told_at_once(serving: Any, model_path: Path) -> None:
    """Also while nobody else waits. What waits for no place is not refused."""
    config = ServeConfig(port=0, max_running=1, max_wait=0.5)
    with serving({"tiny": model_path}, config) as served, served.client() as client:
        slow_steps(served, 0.01)
        assert client.post(PATH, json={**LONG, "max_tokens": 20}).status_code == 200
        held = served.post(PATH, {**LONG, "max_tokens": 500})
        until(lambda: served.driver.running == 1 and served.driver._running[0].tokens > 40)
        start = time.perf_counter()
        refused = client.post(PATH, json=LONG)
        assert time.perf_counter() - start < 0.4
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_too_slow"
        assert int(refused.headers["retry-after"]) >= 1
        turns = {"messages": [{"role": "user", "content": "x"}]}
        assert client.post("/v1/messages/count_tokens", json=turns).status_code == 200
        assert client.post("/v1/messages", json={**turns, "max_tokens": 1}).status_code == 429
        held.close()
        until(served.is_free)
        assert client.post(PATH, json={**LONG, "max_tokens": 2}).status_code == 200
