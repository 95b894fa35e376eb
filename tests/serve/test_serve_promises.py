"""What the server says of itself holds: bounds on time, fair turns, errors that name the field, short steps."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from herd.serve import Keys, ServeConfig
from herd.serve.api import completions
from herd.serve.keys import Client, KeyLimits
from herd.serve.pace import Pace
from herd.serve.parts import PartsResponse, lists_in_parts
from tests.serve.live_server import until


def held_embeddings(served: Any, hold: Callable[[], Any]) -> list[int]:
    """Every text waits for something as it begins; the number of tokens of each."""
    begin, seen = served.llm.embed_in_pieces, list[int]()
    served.llm.embed_in_pieces = lambda ids: (seen.append(len(ids)), hold(), begin(ids))[2]
    return seen


def test_a_request_of_many_texts_has_one_deadline(serving: Any, model_path: Path) -> None:
    with serving({"tiny": model_path}, ServeConfig(port=0, deadline=0.5)) as served, served.client() as client:
        seen = held_embeddings(served, lambda: time.sleep(0.1))
        late = client.post("/v1/embeddings", json={"input": [[1, 2]] * 50})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "deadline_exceeded")
        until(served.is_free)
        assert len(seen) < 10


def test_embeddings_wait_no_longer_than_they_may(serving: Any, model_path: Path) -> None:
    """At once where the pace is known, and when the time is over where it is not."""
    with serving({"tiny": model_path}, ServeConfig(port=0, max_wait=0.2)) as served, served.client() as client:
        driver, turns = served.driver, threading.Semaphore(0)
        seen = held_embeddings(served, lambda: turns.acquire(timeout=30))

        def late() -> float:
            start = time.perf_counter()
            refused = client.post("/v1/embeddings", json={"input": [5]})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_too_slow")
            return time.perf_counter() - start

        first = served.post("/v1/embeddings", {"input": [[1] * 100] * 20})
        until(lambda: driver._working is not None)
        with ThreadPoolExecutor(1) as pool:
            tired = pool.submit(late)
            until(lambda: len(driver._works) == 1)
            time.sleep(0.3)
            turns.release()
            assert tired.result() >= 0.2
        until(lambda: len(seen) == 2)  # the first one's next text has begun: between two of them it waits itself
        # A request that has begun goes on, and what the next text will take is known.
        driver._works_pace.worked(1000.0)
        driver._max_wait = 30.0
        second = served.post("/v1/embeddings", {"input": [[1] * 100] * 20})
        until(lambda: len(driver._works) == 1)
        assert late() < 10  # long before anybody's turn comes
        assert len(driver._works) == 1
        turns.release(100)
        for raw in (first, second):
            raw.settimeout(30)
            assert b" 200 " in raw.recv(20)
            raw.close()
        assert client.post("/v1/embeddings", json={"input": [5]}).status_code == 200
        until(served.is_free)


def test_keys_take_turns_at_embeddings(serving: Any, model_path: Path) -> None:
    """A key's texts come in turn with another key's, however many requests, of however many texts, those are."""
    with serving({"tiny": model_path}, keys=Keys(["greedy-greedy", "modest-modest"])) as served:
        go = threading.Event()
        seen = held_embeddings(served, lambda: go.wait(30))
        asking = [served.post("/v1/embeddings", {"input": [[1] * 9] * 20}, "greedy-greedy") for _ in range(4)]
        until(lambda: len(served.driver._works) == 3)
        asking.append(served.post("/v1/embeddings", {"input": [[1] * 5] * 3}, "modest-modest"))
        until(lambda: len(served.driver._works) == 4)
        go.set()
        for raw in asking:
            raw.settimeout(30)
            assert b" 200 " in raw.recv(20)
            raw.close()
        assert seen[:6].count(5) == 3 and len(seen) == 83


def test_a_full_queue_of_embeddings_is_the_greedy_keys(serving: Any, model_path: Path) -> None:
    """The newest request of the key that has most of them gives way; who has gone counts no more."""
    keys = Keys(["greedy-greedy", "modest-modest"])
    with serving({"tiny": model_path}, ServeConfig(port=0, max_queue=3), keys) as served:
        driver, go = served.driver, threading.Event()
        greedy, modest = Client("greedy", KeyLimits()), Client("modest", KeyLimits())

        def begin(ids: list[int]) -> Any:
            go.wait(30)
            return served.llm.embed_in_pieces(ids)

        async def ask() -> None:
            async def waits(client: Client, length: int, waiting: int) -> asyncio.Task[Any]:
                task = asyncio.create_task(driver.between_steps(begin, [[1] * length], client))
                while len(driver._works) != waiting or driver._working is None:
                    await asyncio.sleep(0.005)
                return task

            crowd = [await waits(greedy, 2 + i, i) for i in range(4)]
            with pytest.raises(Exception, match="too many"):
                await driver.between_steps(begin, [[1]], greedy)
            other = await waits(modest, 9, 3)
            with pytest.raises(Exception, match="too many"):
                await crowd.pop()
            crowd[1].cancel()
            await asyncio.gather(crowd.pop(1), return_exceptions=True)
            assert len(driver._works) == 2
            again = await waits(greedy, 4, 3)
            go.set()
            assert all(len(found) == 1 for found in await asyncio.gather(*crowd, other, again))

        asyncio.run(asyncio.wait_for(ask(), 30))
        until(served.is_free)


@dataclass
class Answer:
    """A simulated request: a prompt of which a part is remembered, and an answer that ends before its limit."""

    prompt: int
    remembered: int
    most: int
    length: int
    computed: int = 0
    credited: float = 0.0

    @property
    def cost(self) -> int:
        return self.prompt + self.most

    @property
    def computable(self) -> int:
        return self.cost - self.remembered


def estimates(kind: Any, *, batches: int, seconds: float, cancelled: int = 0) -> list[float]:
    """Of what a thousand takes, in every second of batches of 16 answers that begin and end together."""
    pace, found = Pace(), []
    for _ in range(batches):
        answers = [kind() for _ in range(16)]
        for tick in range(1, round(seconds * 10) + 1):
            for i, answer in enumerate(answers):
                total = answer.prompt - answer.remembered + answer.length
                answer.computed = round(total * tick / (seconds * 10))
                if i >= cancelled or tick <= seconds * 5:  # those end halfway, and their places stay empty
                    pace.went_on(answer)
            pace.worked(0.1)
            if tick % 10 == 0:
                found.append(pace.seconds(1000))
        for answer in answers[cancelled:]:
            pace.finished(answer)
    return found


LONG_ANSWERS = {"whole": (500, 0, 500, 500), "remembered": (900, 800, 100, 100), "early": (200, 0, 4000, 400)}


@pytest.mark.parametrize("kind", LONG_ANSWERS)
def test_the_pace_is_known_while_long_answers_run(kind: str) -> None:
    """Batches of 60 s: the estimate is there from the first second on, and stays near the truth."""
    prompt, remembered, most, length = LONG_ANSWERS[kind]
    found = estimates(lambda: Answer(prompt, remembered, most, length), batches=4, seconds=60)
    truth = 60 / 16 * 1000 / (prompt + most)
    known = found if kind != "early" else found[60:]  # that answers end early is seen when the first ones have
    assert all(0.9 * truth < seconds < 1.1 * truth for seconds in known[2:] if kind != "early"), (truth, found)
    assert all(0.9 * truth < seconds < 1.1 * truth for seconds in found[180:]), (truth, found[180:])
    assert found[0] >= 0.9 * truth  # never as if nothing were to be done


def test_cancelled_answers_are_no_work_that_was_done() -> None:
    """Half of each batch is cancelled in the middle: what remains is what 12 answers cost."""
    found = estimates(lambda: Answer(500, 0, 500, 500), batches=20, seconds=6, cancelled=8)
    assert sum(found[-12:]) / 12 == pytest.approx(6 / 12, rel=0.15)


def test_who_begins_again_is_counted_once() -> None:
    pace, answer = Pace(), Answer(100, 0, 100, 100)
    for computed, cost in ((50, 50), (150, 150), (0, 150), (100, 150), (200, 200)):
        answer.computed = computed
        pace.went_on(answer)
        assert pace._cost == pytest.approx(cost)
    pace.finished(answer)
    assert pace._cost == pytest.approx(200)


def test_the_pace_of_a_running_model(serving: Any, model_path: Path) -> None:
    """It is known before the first answer ends; a request whose client has gone counts for what it had."""
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}
    with serving({"tiny": model_path}) as served:
        pace, step = served.driver._pace, served.llm.backend.step
        served.llm.backend.step = lambda spans: (time.sleep(0.02), step(spans))[1]
        raw = served.post("/v1/completions", body)
        until(lambda: pace.seconds(1) > 0)
        raw.close()
        until(served.is_free)
        assert 0 < pace._cost < 400 and pace._computed == 0
        served.llm.backend.step = step
        with served.client() as client:
            assert client.post("/v1/completions", json=body).status_code == 200
        until(lambda: pace._computed >= 400)  # counted after the answer is sent


TOO_LONG = [
    ("/v1/completions", "prompt", {"prompt": [1] * 600}),
    ("/v1/embeddings", "input", {"input": [1] * 600}),
    ("/v1/chat/completions", "messages", {"messages": [{"role": "user", "content": "a b c d " * 200}]}),
    ("/v1/messages", "messages", {"messages": [{"role": "user", "content": "a b c d " * 200}], "max_tokens": 5}),
    ("/v1/responses", "input", {"input": "a b c d " * 200}),
]


@pytest.mark.parametrize(("path", "field", "body"), TOO_LONG)
def test_what_is_too_long_is_named(served: Any, path: str, field: str, body: dict[str, Any]) -> None:
    with served.client() as client:
        error = client.post(path, json=body).json()["error"]
    assert (error["param"], error["code"]) == (field, "context_length_exceeded"), error
    assert "512" in error["message"] and "lower" not in error["message"].lower()


ASKS_TOO_MUCH = [
    ("/v1/completions", "max_tokens", {"prompt": [1] * 20}),
    ("/v1/chat/completions", "max_tokens", {"messages": [{"role": "user", "content": "x"}]}),
    ("/v1/chat/completions", "max_completion_tokens", {"messages": [{"role": "user", "content": "x"}]}),
    ("/v1/messages", "max_tokens", {"messages": [{"role": "user", "content": "x"}]}),
    ("/v1/responses", "max_output_tokens", {"input": "x"}),
    ("/v1/responses", "max_output_tokens", {"input": "x", "truncation": "auto"}),
]


@pytest.mark.parametrize(("path", "field", "body"), ASKS_TOO_MUCH)
def test_an_answer_that_is_too_long_is_named(served: Any, path: str, field: str, body: dict[str, Any]) -> None:
    """Both parts are told, and the largest answer that has room: it is answered, and one token more is not."""
    with served.client() as client:
        error = client.post(path, json={**body, field: 700}).json()["error"]
        assert (error["param"], error["code"]) == (field, "context_length_exceeded"), error
        context, needed, prompt, answer, most = map(int, re.findall(r"\d+", error["message"]))
        assert (context, answer) == (512, 700) and prompt + answer == needed and prompt + most == context
        assert error["message"].endswith(f"{answer} for the answer. Lower {field} to {most} at most"), error
        assert client.post(path, json={**body, field: most}).status_code == 200
        error = client.post(path, json={**body, field: most + 1}).json()["error"]
        assert error["param"] == field and f"to {most} at most, or shorten" in error["message"]


@pytest.mark.parametrize(("path", "field"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")])
def test_ids_that_are_no_tokens_are_named(served: Any, path: str, field: str) -> None:
    with served.client() as client:
        for given, param in (([99999], field), ([[1], [2, 99999]], f"{field}.1")):
            response = client.post(path, json={field: given})
            assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
            assert "99999" in response.text


def test_a_stream_of_two_prompts_is_never_begun(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[Any] = []
    submit = served.driver.submit
    monkeypatch.setattr(served.driver, "submit", lambda *a, **more: (submitted.append(a), submit(*a, **more))[1])
    with served.client() as client:
        refused = client.post("/v1/completions", json={"prompt": ["a", "b"], "stream": True, "max_tokens": 2})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt" and not submitted


def test_scored_prompts_are_the_same_in_slices(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte as in one piece, where no slice ends and where many do, BOS hidden or not."""
    monkeypatch.setattr(completions, "new_id", lambda prefix: prefix)
    with served.client() as client:
        for prompt in ("def f(x):\n    return x " * 9, [1, 300, 7, 9, 300], ["ab", "c"]):
            for more in ({"echo": True}, {"echo": True, "max_tokens": 0}, {}):
                body = {"prompt": prompt, "logprobs": 3, "max_tokens": 8, "seed": 1, **more}
                found = set()
                for size in (2, 7, 100_000):
                    monkeypatch.setattr(completions, "SLICE", size)
                    text = client.post("/v1/completions", json=body).content
                    whole = orjson.loads(text)
                    assert orjson.dumps(whole) == text
                    del whole["created"], whole["usage"]  # of which the first has nothing remembered
                    found.add(orjson.dumps(whole))
                assert len(found) == 1


def test_long_json_goes_out_in_parts() -> None:
    """No part is much longer than a quarter of a megabyte."""
    slices = [{"a": [i] * 1000, "b": [{"x": "y" * 90}] * 1000} for i in range(40)]
    whole = orjson.dumps({"a": [i for s in slices for i in s["a"]], "b": [b for s in slices for b in s["b"]]})
    parts = list(lists_in_parts(slices))
    assert b"".join(parts) == whole
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    response = PartsResponse(parts)
    asyncio.run(response({"type": "http"}, None, send))  # type: ignore[arg-type]
    assert dict(sent[0]["headers"])[b"content-length"] == str(len(whole)).encode()
    bodies = [message["body"] for message in sent[1:]]
    assert b"".join(bodies) == whole and max(map(len, bodies)) < 400_000
    assert [message["more_body"] for message in sent[1:]] == [True] * (len(bodies) - 1) + [False]
