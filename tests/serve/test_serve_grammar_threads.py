"""Grammars are tried by the threads that are there for it, not by the event loop or the batch; for nobody in vain."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance")

from herd.engine import grammar_trial as trials
from herd.serve import ServeConfig
from tests.serve.live_server import until

PATH = "/v1/completions"


TOOLS = {
    "messages": [{"role": "user", "content": "x"}],
    "tools": [{"type": "function", "function": {"name": name, "strict": True}} for name in ("f", "g")],
    "tool_choice": "required",
    "max_tokens": 3,
}


def body_of(n: int) -> dict[str, Any]:
    return {"prompt": "x", "max_tokens": 9, "response_format": {"type": "regex", "grammar": f"[a-f]{{{n}}}"}}


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads in which grammars were tried, as they come."""
    found: list[str] = []
    error = trials.Trial.error

    def noted(self: Any, source: str) -> str | None:
        found.append(threading.current_thread().name)
        return error(self, source)

    monkeypatch.setattr(trials.Trial, "error", noted)
    monkeypatch.setattr("herd.engine.constraint.REMEMBERED", 1)
    return found


def test_by_their_own_threads_and_once(serving: Any, model_path: Path, threads: list[str]) -> None:
    """Each is forgotten before its request's turn comes, and the first of a request with several even before that."""
    config = ServeConfig(port=0, max_running=1)
    with serving({"tiny": model_path}, config) as served:
        with served.paused():
            held = served.post(PATH, {"prompt": "x", "max_tokens": 2})
            until(lambda: served.driver.running == 1)
            asked = [served.post(PATH, body_of(n)) for n in (1, 2, 3)]
            asked.append(served.post("/v1/chat/completions", TOOLS))
            until(lambda: served.driver.waiting == 4)
            tried = list(threads)
            assert len(tried) >= 5
        for raw in [held, *asked]:
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
            raw.close()
        assert threads == tried and all(name.startswith("herd-grammars") for name in threads), threads


def test_not_for_requests_that_find_no_room(serving: Any, model_path: Path, threads: list[str]) -> None:
    with serving({"tiny": model_path}, ServeConfig(port=0, max_running=1, max_queue=1)) as served:
        with served.paused(), served.client() as client:
            held = [served.post(PATH, {"prompt": "x", "max_tokens": 2})]
            until(lambda: served.driver.running == 1)
            held.append(served.post(PATH, {"prompt": "x", "max_tokens": 2}))
            until(lambda: served.driver.waiting == 1)
            refused = client.post(PATH, json=body_of(5))
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
            assert not threads
        for raw in held:
            raw.close()
        until(served.is_free)
