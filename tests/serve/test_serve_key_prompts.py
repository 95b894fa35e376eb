"""A request of several prompts or texts counts as so many for its key's requests a minute."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from herd.serve import Keys
from herd.serve.keys import Client, KeyLimits, StoredKey

KEY = "correct-horse-battery"


def keys(per_minute: float) -> Keys:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    return Keys(stored={"ann": StoredKey(sha256=digest, requests_per_minute=per_minute)})


def test_an_allowance_of_prompts() -> None:
    now = [0.0]
    client = Client("ann", KeyLimits(requests_per_minute=6), lambda: now[0])
    assert client.most == 6 and client.wait(6)[1] == 0.0
    client.enter(4)
    client.leave(0)
    assert client.wait(2)[1] == 0.0
    assert client.wait(3)[1] == pytest.approx(10.0)  # one more comes every 10 s
    now[0] = 10.0
    assert client.wait(3)[1] == 0.0
    assert Client("bob", KeyLimits()).most == float("inf")
    assert Client("eve", KeyLimits(requests_per_minute=0.5)).most == 1.0  # one every two minutes


@pytest.mark.parametrize(
    ("path", "field", "more"),
    [
        ("/v1/completions", "prompt", {"max_tokens": 1}),
        ("/v1/completions", "prompt", {"max_tokens": 1, "n": 2}),
        ("/v1/embeddings", "input", {}),
    ],
)
def test_prompts_count_over_http(serving: Any, model_path: Path, path: str, field: str, more: dict[str, Any]) -> None:
    with (
        serving({"tiny": model_path}, keys=keys(5)) as served,
        served.client(headers={"authorization": f"Bearer {KEY}"}) as client,
    ):

        def ask(prompts: Any) -> Any:
            return client.post(path, json={field: prompts, **more})

        refused = ask(["x"] * 6)  # more than there ever is
        assert refused.status_code == 400 and refused.json()["error"]["param"] == field
        assert (
            "6 are too many" in refused.json()["error"]["message"]
            and "5 a minute" in refused.json()["error"]["message"]
        )
        assert ask([[1, 2], [3]]).status_code == 200
        later = ask(["a", "b", "c", "d"])  # three are left: refused as a whole, and nothing of it is counted
        assert later.status_code == 429 and 1 <= int(later.headers["retry-after"]) <= 13
        assert ask(["a", "b"]).status_code == 200
        assert ask([1, 2, 3]).status_code == 200  # the ids of one prompt
        last = ask("one")
        assert last.status_code == 429 and last.json()["error"]["code"] == "rate_limit_exceeded"
