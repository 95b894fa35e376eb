"""Embeddings beside answers: in pieces, with the same bits, given up when nobody waits, without a page left behind."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import herd
from herd.engine import Sampling
from herd.engine.backend import CacheFull, Span
from herd.engine.native_backend import NativeBackend
from herd.engine.paged_cache import PagedCache
from herd.errors import ContextLengthExceeded
from herd.serve import ServeConfig
from herd.serve.errors import ApiError
from herd.serve.keys import Client, KeyLimits
from herd.serve.piecework import Piecework

ANN = Client("ann", KeyLimits())
LONG = [1 + i % 500 for i in range(500)]


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def driver_of(served: Any) -> Any:
    return served.registry.loaded[0].driver


def all_free(served: Any) -> bool:
    driver = driver_of(served)
    pages = driver.llm.backend._pages
    return driver.idle and not driver.llm.backend._sequences and pages.available == pages.n_pages


def in_pieces(llm: Any, ids: list[int], sizes: list[int]) -> Any:
    """A vector, with pieces of these sizes, again and again, and a step of the batch after each."""
    pieces = llm.embed_in_pieces(ids)
    try:
        for size in itertools.cycle(sizes):
            pieces.send(size)
            llm.step()
    except StopIteration as end:
        return end.value


def in_one_go(llm: Any, ids: list[int]) -> Any:
    """The mean of the states of one native call."""
    states_SD = np.empty((len(ids), llm.config.dim), np.float32)
    handle = llm.backend._unremembered(None)
    llm.backend._run([Span(handle, ids)], np.arange(len(ids), dtype=np.int32), states=states_SD)
    llm.backend.release(handle)
    return states_SD.mean(0)


@pytest.mark.parametrize("sizes", [[1], [3, 64, 1], [100], [499], [512], [1000]])
def test_pieces_give_the_same_bits(model_path: Path, sizes: list[int]) -> None:
    """Whatever their sizes, and whoever generates between them."""
    with herd.LLM(model_path, threads=1) as llm:
        plain = in_one_go(llm, LONG).tobytes()
        assert llm.embed(LONG).tobytes() == plain
        alone = llm.generate("def", max_tokens=40, seed=1, ignore_eos=True)
        ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode("def")]
        beside = llm.begin(ids, Sampling(max_tokens=40, seed=1, ignore_eos=True))
        assert in_pieces(llm, LONG, sizes).tobytes() == plain
        while beside[0].completion is None:
            llm.step()
        assert beside[0].completion.token_ids == alone.token_ids
        assert not llm.backend._sequences


def test_the_torch_backend_gives_its_own_bits(model_path: Path) -> None:
    pytest.importorskip("torch")
    with herd.LLM(model_path, backend="torch") as llm:
        assert in_pieces(llm, LONG, [64]).tobytes() == llm.embed(LONG).tobytes()


def test_what_does_not_fit(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is taken for all of a text at once: where there is none, nothing is held."""
    with herd.LLM(model_path, threads=1) as llm:
        with pytest.raises(ContextLengthExceeded):
            llm.embed_in_pieces([1] * 513)
        monkeypatch.setattr(NativeBackend, "grow", lambda self, sequence, n_tokens: False)
        with pytest.raises(CacheFull):
            llm.embed_in_pieces(LONG)
        assert not llm.backend._sequences


def slowed(served: Any, seconds: float = 0.0, before: Callable[[], Any] = lambda: None) -> list[int]:
    """Pieces of 64 tokens at most, each of which takes a while, or waits for something; their sizes as they come."""
    driver = driver_of(served)
    sizes: list[int] = []
    run = driver.llm.backend._run

    def slowly(spans: Any, wanted: Any, **outputs: Any) -> None:
        if "states" in outputs:
            sizes.append(len(wanted))
            time.sleep(seconds)
            before()
        run(spans, wanted, **outputs)

    driver.llm.backend._run = slowly
    driver._learn = lambda tokens, seconds: None
    driver._prompt_speed = 1.0
    return sizes


def test_answers_go_on_between_the_pieces(serving: Any, model_path: Path) -> None:
    """A long text beside an answer: steps come between its pieces, and both are what they are alone."""
    with serving({"tiny": model_path}) as served, served.client() as client:
        driver = driver_of(served)
        sizes = slowed(served, before=lambda: until(lambda: len(sizes) != 2 or driver.waiting > 0))
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "seed": 3, "ignore_eos": True}
        alone = client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]
        expected = in_one_go(driver.llm, LONG)
        expected /= np.linalg.norm(expected[None], axis=1)
        sizes.clear()
        steps_at: list[int] = []  # how many pieces were done at each step
        step = driver.llm.backend.step
        driver.llm.backend.step = lambda spans: (steps_at.append(len(sizes)), step(spans))[1]
        with ThreadPoolExecutor(2) as pool:
            vector = pool.submit(client.post, "/v1/embeddings", json={"input": LONG})
            until(lambda: len(sizes) == 2)
            beside = pool.submit(client.post, "/v1/chat/completions", json=chat)
        assert vector.result().json()["data"][0]["embedding"] == expected.tolist()
        assert beside.result().json()["choices"][0]["message"] == alone
        assert sizes == [64] * 7 + [52]
        assert {2, 3, 4, 5, 6, 7} <= set(steps_at)  # steps came between the pieces
        until(lambda: all_free(served))


def ask(served: Any, ids: list[int]) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    data = json.dumps({"input": ids}).encode()
    raw = socket.create_connection((host, int(port)), timeout=60)
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    raw.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return raw


def test_whoever_goes_away_ends_the_work(serving: Any, model_path: Path) -> None:
    """Between two pieces, and before the first one; the next one waiting is served."""
    with serving({"tiny": model_path}) as served, served.client() as client:
        sizes = slowed(served, 0.1)
        first = ask(served, LONG)
        until(lambda: len(sizes) == 1)
        second = ask(served, LONG)
        until(lambda: len(driver_of(served)._works) == 1)
        second.close()
        first.close()
        assert client.post("/v1/embeddings", json={"input": [5, 6]}).status_code == 200
        assert sizes[-1] == 2 and len(sizes) <= 5, sizes
        until(lambda: all_free(served))


def test_work_that_is_given_up_is_closed() -> None:
    """By whoever waited for it, or with the model; what it held is free at once."""

    def work() -> Any:
        while True:
            yield

    async def both() -> list[Any]:
        found = []
        for leave in (True, False):
            pieces = work()
            next(pieces)
            job = Piecework(lambda _, pieces=pieces: pieces, [[1]], ANN)  # type: ignore[misc]
            assert job.advance(1)
            if leave:
                job.result.cancel()
                assert not job.advance(1)
            else:
                job.give_up(ApiError(503, "stops"))
                with pytest.raises(ApiError):
                    await job.result
            found.append(pieces.gi_frame)
        return found

    assert asyncio.run(both()) == [None, None]


def test_a_deadline_and_the_end_of_the_model(serving: Any, model_path: Path) -> None:
    with serving({"tiny": model_path}, ServeConfig(port=0, deadline=0.3)) as served, served.client() as client:
        sizes = slowed(served, 0.1)
        late = client.post("/v1/embeddings", json={"input": LONG})
        assert late.status_code == 503 and late.json()["error"]["code"] == "deadline_exceeded"
        until(lambda: all_free(served))
        assert len(sizes) < 7
    with serving({"tiny": model_path}) as served:
        sizes = slowed(served, 0.1)
        driver = driver_of(served)

        async def two() -> list[Any]:
            begin = driver.llm.embed_in_pieces
            works = [asyncio.create_task(driver.between_steps(begin, [LONG], ANN)) for _ in range(2)]
            while not sizes:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(driver.stop, ApiError(503, "stops"))
            return await asyncio.wait_for(asyncio.gather(*works, return_exceptions=True), 20)

        assert all(isinstance(error, ApiError) for error in asyncio.run(two()))
        assert not driver.llm.backend._sequences


def test_a_cache_full_of_answers(serving: Any, model_path: Path) -> None:
    """Answers that hold all room give way to an embedding, and come out the same as alone; two take turns."""
    with serving({"tiny": model_path}, ctx=512, page_tokens=16) as served, served.client() as client:
        slowed(served)
        driver = driver_of(served)
        body = {"prompt": LONG[:100], "max_tokens": 300, "ignore_eos": True, "seed": 1}
        alone = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        backend, scheduler = driver.llm.backend, driver.llm.scheduler
        made_way: list[int] = []
        make_way = scheduler.make_way
        scheduler.make_way = lambda: (made_way.append(scheduler.running), make_way())
        backend._pages = PagedCache(40, 16, backend._copy_page, 32)  # 640 tokens; 512 of them are a text's
        with ThreadPoolExecutor(5) as pool:
            answers = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(3)]
            until(lambda: driver.running > 0)
            vectors = [pool.submit(client.post, "/v1/embeddings", json={"input": LONG}) for _ in range(2)]
        assert all(answer.result().json()["choices"][0]["text"] == alone for answer in answers)
        first, second = (vector.result().json()["data"][0]["embedding"] for vector in vectors)
        np.testing.assert_array_equal(first, second)
        assert first == driver.llm.embed(LONG, normalise=True).tolist()
        until(lambda: all_free(served))
        assert made_way and made_way[0] > 0
