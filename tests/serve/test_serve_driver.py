"""Load: requests that go away, wait too long or are too many; and answers that do not depend on who else asks."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from herd.serve import Keys, ServeConfig
from tests.serve.live_server import memory_for, until

LONG = {"messages": [{"role": "user", "content": "tell me all"}], "max_tokens": 400, "ignore_eos": True, "seed": 1}


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_goes_away_stops_the_work(serving: Any, model_path: Path, stream: bool) -> None:
    """While answers are generated, and while a request waits in the queue."""
    with serving({"tiny": model_path}, ServeConfig(port=0, max_running=1)) as served:
        first = served.post("/v1/chat/completions", {**LONG, "stream": stream})
        until(lambda: served.driver.running == 1)
        second = served.post("/v1/chat/completions", {**LONG, "stream": stream})
        until(lambda: served.driver.waiting == 1)
        second.close()
        until(lambda: served.driver.waiting == 0)
        tokens = served.llm.scheduler.tokens
        first.close()
        until(served.is_free)
        assert served.llm.scheduler.tokens - tokens < 400
        with served.client() as client:
            assert client.post("/v1/chat/completions", json={**LONG, "max_tokens": 2}).status_code == 200


def disconnects(served: Any, count: int) -> None:
    """Requests that are given up at random moments: before they are read, queued, in the prompt, in the answer."""
    rng = random.Random(5)

    def one(seed: int) -> None:
        rng = random.Random(seed)
        chat = {**LONG, "stream": rng.random() < 0.5, "n": rng.choice([1, 1, 3]), "seed": seed}
        text = {"prompt": "def " * rng.randrange(1, 90), "max_tokens": 50, "stream": chat["stream"], "ignore_eos": True}
        raw = served.post(*rng.choice([("/v1/chat/completions", chat), ("/v1/completions", text)]))
        time.sleep(rng.expovariate(20))
        if rng.random() < 0.3:
            raw.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                raw.recv(4096)
        raw.close()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, [rng.randrange(1 << 30) for _ in range(count)]))
    until(served.is_free)


def test_disconnects_at_random_moments(serving: Any, model_path: Path) -> None:
    with serving({"tiny": model_path}, ServeConfig(port=0, max_running=8)) as served:
        disconnects(served, 100)


@pytest.mark.slow
def test_a_thousand_disconnects(serving: Any, model_path: Path) -> None:
    with serving({"tiny": model_path}, ServeConfig(port=0, max_running=8)) as served:
        disconnects(served, 1000)


def test_a_full_queue_says_when_to_come_again(serving: Any, model_path: Path) -> None:
    with serving({"tiny": model_path}, ServeConfig(port=0, max_running=1, max_queue=2)) as served:
        with served.paused(), served.client() as client:
            held = [served.post("/v1/chat/completions", LONG)]
            until(lambda: served.driver.running == 1)
            held += [served.post("/v1/chat/completions", LONG) for _ in range(2)]
            until(lambda: served.driver.waiting == 2)
            refused = client.post("/v1/chat/completions", json=LONG)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
            assert client.get("/health").status_code == 200
        for raw in held:
            raw.close()
        until(served.is_free)


@pytest.mark.parametrize("stream", [True, False])
def test_deadlines(serving: Any, model_path: Path, stream: bool) -> None:
    """In the queue, where a status is still possible, and in the middle of a stream."""
    with serving({"tiny": model_path}, ServeConfig(port=0, max_running=1)) as served, served.client() as client:
        held = served.post("/v1/chat/completions", LONG)
        until(lambda: served.driver.running == 1)
        late = client.post("/v1/chat/completions", json={**LONG, "timeout": 0.01, "stream": stream})
        assert late.status_code == 400 and late.json()["error"]["code"] == "timeout_exceeded"
        held.close()
        until(served.is_free)
        cut = client.post("/v1/chat/completions", json={**LONG, "timeout": 0.05, "stream": stream})
        if stream and cut.status_code == 200:
            *_, last = [line for line in cut.text.split("\n\n") if line]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout_exceeded"
        else:
            assert cut.status_code == 400
        until(served.is_free)


def test_keys_share_the_model(serving: Any, model_path: Path) -> None:
    """One key sends many requests at once; another key's single one is not behind them all."""
    keys = Keys(["greedy-greedy", "modest-modest"])
    with serving({"tiny": model_path}, ServeConfig(port=0, max_running=1), keys) as served:
        done: list[str] = []

        def ask(key: str, name: str) -> None:
            with served.client(headers={"authorization": f"Bearer {key}"}) as client:
                body = {**LONG, "max_tokens": 80}  # long enough that who hears of an answer first had it first
                assert client.post("/v1/chat/completions", json=body).status_code == 200
                done.append(name)

        with served.paused():
            held = served.post("/v1/chat/completions", LONG, "greedy-greedy")
            until(lambda: served.driver.running == 1)
            crowd = [threading.Thread(target=ask, args=("greedy-greedy", "greedy")) for _ in range(10)]
            crowd.append(threading.Thread(target=ask, args=("modest-modest", "modest")))
            for waiting, thread in enumerate(crowd, 1):
                thread.start()
                until(lambda waiting=waiting: served.driver.waiting == waiting)  # type: ignore[misc]
        held.close()
        for thread in crowd:
            thread.join()
        assert done.index("modest") <= 1, done


def test_answers_do_not_depend_on_who_else_asks(serving: Any, model_path: Path) -> None:
    """Texts, and the bits of log-probabilities, alone and in a crowd that comes and goes; so says the fingerprint."""

    def ask(client: Any, i: int) -> tuple[Any, ...]:
        text = "class A:\n    def f(self):\n        return " + str(i % 5) * (i % 7 + 1)
        body = {"prompt": text, "max_tokens": 24, "seed": i % 5, "temperature": 0.8 * (i % 2), "logprobs": 3}
        answer = client.post("/v1/completions", json=body).json()
        choice = answer["choices"][0]
        return choice["text"], json.dumps(choice["logprobs"]), answer["system_fingerprint"]

    with serving({"tiny": model_path}, draft="ngram") as served, served.client() as client:
        alone = [ask(client, i) for i in range(35)]
    with serving({"tiny": model_path}) as served, served.client() as client, ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda i: ask(client, i % 35), range(105))) == alone * 3


def test_models_come_and_go(serving: Any, model_path: Path, other_path: Path) -> None:
    """Two models in memory for one; the idle one makes way, one in use does not."""
    config = ServeConfig(port=0, memory=int(1.5 * memory_for(model_path)))
    with serving({"tiny": model_path, "other": other_path}, config) as served, served.client() as client:

        def ask(name: str, **more: Any) -> Any:
            return client.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 2, **more})

        texts = {name: ask(name, temperature=0).json()["choices"][0]["text"] for name in ("tiny", "other")}
        assert [model.name for model in served.registry.loaded] == ["other"]
        assert ask("tiny", temperature=0).json()["choices"][0]["text"] == texts["tiny"]
        assert [m["loaded"] for m in client.get("/v1/models").json()["data"]] == [True, False]
        with served.paused():
            busy = served.post("/v1/completions", {"prompt": "x", "max_tokens": 2, "model": "tiny"})
            until(lambda: served.driver.running == 1)
            refused = ask("other")
            assert refused.status_code == 503 and "retry-after" in refused.headers
        busy.close()
        until(served.is_free)
        assert ask("other").status_code == 200


def test_an_unexpected_failure_ends_one_step_and_not_the_server(
    serving: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving({"tiny": model_path}) as served, served.client() as client:
        backend = served.llm.backend
        step = backend.step

        def broken(spans: Any) -> Any:
            monkeypatch.setattr(backend, "step", step)
            raise RuntimeError("secret detail")

        monkeypatch.setattr(backend, "step", broken)
        failed = client.post("/v1/chat/completions", json={**LONG, "max_tokens": 2})
        assert failed.status_code == 500 and "secret" not in failed.text
        assert client.post("/v1/chat/completions", json={**LONG, "max_tokens": 2}).status_code == 200
        until(served.is_free)


def test_silence_is_filled(serving: Any, model_path: Path) -> None:
    """A stream that waits says that the server lives."""
    config = ServeConfig(port=0, max_running=1, ping_seconds=0.05)
    with serving({"tiny": model_path}, config) as served, served.client() as client:
        held = served.post("/v1/chat/completions", LONG)
        until(lambda: served.driver.running == 1)
        body = {**LONG, "max_tokens": 2, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            assert next(line for line in lines if line) == ": ping"
            held.close()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
