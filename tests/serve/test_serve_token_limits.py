"""Tokens a minute of a key hold before the work: what a request may take is reserved, and given back at its end."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from herd.serve import Keys
from herd.serve.keys import Client, KeyLimits, StoredKey
from tests.serve.live_server import until

KEY = "correct-horse-battery"


def test_tokens_are_reserved_and_given_back() -> None:
    now = [0.0]
    client = Client("ann", KeyLimits(tokens_per_minute=60), lambda: now[0])
    assert client.most_tokens == 60 and client.wait_for_tokens(60) == 0.0
    client.enter()
    client.reserve(50)
    assert client.wait_for_tokens(10) == 0.0
    assert client.wait_for_tokens(20) == pytest.approx(10.0)  # one comes each second
    client.leave(15, 50)
    assert client.wait_for_tokens(45) == 0.0 and client.wait_for_tokens(46) == pytest.approx(1.0)
    now[0] = 1.0
    assert client.wait_for_tokens(46) == 0.0
    assert Client("bob", KeyLimits()).most_tokens == float("inf")
    assert Client("bob", KeyLimits()).wait_for_tokens(10**9) == 0.0


@pytest.fixture
def limited(serving: Any, model_path: Path) -> Any:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    keys = Keys(stored={"ann": StoredKey(sha256=digest, tokens_per_minute=200)})
    with (
        serving({"tiny": model_path}, keys=keys) as served,
        served.client(headers={"authorization": f"Bearer {KEY}"}) as client,
    ):
        yield client


def test_a_burst_takes_no_more_than_a_minutes_worth(limited: Any) -> None:
    body = {"prompt": "x", "max_tokens": 60, "ignore_eos": True}
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: limited.post("/v1/completions", json=body), range(20)))
    good = [answer.json()["usage"]["total_tokens"] for answer in answers if answer.status_code == 200]
    assert 1 <= len(good) <= 3 and sum(good) <= 200
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in refused} == {429}
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)


def test_what_is_not_taken_is_given_back(limited: Any) -> None:
    """A stop ends the answers after a token or two, of 150."""
    body = {"prompt": "x", "max_tokens": 150, "ignore_eos": True, "stop": list("etaoinshrdlu ,.(")}
    for _ in range(6):

        def ends_early() -> bool:
            answer = limited.post("/v1/completions", json=body)
            if answer.status_code == 200:
                assert answer.json()["usage"]["completion_tokens"] < 20
            return bool(answer.status_code == 200)

        until(ends_early, 5)


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("/v1/completions", "prompt", {"prompt": ["x", "y"], "max_tokens": 100}),
        ("/v1/completions", "prompt", {"prompt": "x", "max_tokens": 50, "n": 4}),
        ("/v1/chat/completions", "messages", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/responses", "input", {"input": "x", "max_output_tokens": 199}),
        ("/v1/messages", "messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 199}),
        ("/v1/embeddings", "input", {"input": [[1] * 101] * 2}),
    ],
)
def test_more_than_a_minutes_worth_never_fits(limited: Any, path: str, field: str, body: dict[str, Any]) -> None:
    refused = limited.post(path, json=body)
    error = refused.json()["error"]
    assert refused.status_code == 400 and "200 a minute" in error["message"]
    if path != "/v1/messages":
        assert (error["param"], error["code"]) == (field, "rate_limit_exceeded")
    assert limited.post("/v1/completions", json={"prompt": "x", "max_tokens": 150}).status_code == 200


def test_texts_to_embed_count_before_they_are_computed(limited: Any) -> None:
    body = {"input": [[1 + i for i in range(60)]]}
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: limited.post("/v1/embeddings", json=body), range(12)))
    assert sorted({answer.status_code for answer in answers}) == [200, 429]
    assert sum(answer.status_code == 200 for answer in answers) == 3
