"""More requests than a model can answer: those that would wait too long are told so, the others are served in time."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from herd.serve import ServeConfig
from herd.serve.pace import Pace


def _request() -> Any:
    return SimpleNamespace(cost=50, computed=50, computable=50, credited=0.0)


def test_pace_is_what_was_finished_over_the_time_it_took() -> None:
    pace = Pace()
    assert pace.seconds(1000) == 0  # nothing is known
    for _ in range(100):
        pace.worked(0.1)
        pace.finished(_request())
    assert pace.seconds(1000) == pytest.approx(2.0, rel=0.02)
    for _ in range(1000):  # slower now: what was forgets itself
        pace.worked(0.4)
        pace.finished(_request())
    assert pace.seconds(1000) == pytest.approx(8.0, rel=0.02)


def test_who_would_wait_too_long_is_refused_at_once(serving: Any, model_path: Path) -> None:
    most = 0.3  # seconds
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}
    statuses: Counter[int] = Counter()
    with serving({"tiny": model_path}, ServeConfig(port=0, max_running=1, max_wait=most)) as found:
        with found.client() as client:
            start = time.perf_counter()
            assert client.post("/v1/completions", json=body).status_code == 200  # alone nothing is refused
            alone = time.perf_counter() - start

        def ask() -> None:
            with found.client() as client:
                start = time.perf_counter()
                response = client.post("/v1/completions", json=body)
                seconds = time.perf_counter() - start
            statuses[response.status_code] += 1
            if response.status_code == 429:
                assert response.json()["error"]["code"] == "queue_too_slow"
                assert 1 <= int(response.headers["retry-after"]) <= 60
            else:
                assert seconds < most + 20 * alone

        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 429} and statuses[429] > 10, statuses
        with found.client() as client:
            assert client.post("/v1/completions", json=body).status_code == 200
            assert "queue_too_slow" not in client.post("/tokenize", json={"content": "x"}).text
