"""`--memory`: what models may take together, measured, and who makes way; and what a server says of its memory."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from herd import LLM
from herd.errors import OutOfMemory
from herd.serve import ServeConfig
from herd.serve.metrics import Metrics
from herd.serve.replicas.figures import merged
from tests.serve.live_server import memory_for
from tests.serve.program import Program, until

PATH = "/v1/completions"


def figures(page: str) -> dict[str, float]:
    """Of one model's metrics, by name."""
    lines = [line.split() for line in page.splitlines() if not line.startswith("#")]
    return {name.split("{")[0]: float(value) for name, value in lines if "_bucket" not in name}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_limit_holds_for_all_that_a_model_takes(make_model: Callable[..., Path]) -> None:
    """64 answers, whose keys and values are four times as large as the limit: some give way to others, and all end."""
    model = make_model(talkative=True, context_length=512, n_layers=8, n_kv_heads=6)
    limit = 20 << 20
    server = Program(model, "--kv", "f32", "--threads", 1, "--memory", limit)
    try:
        until(lambda: server.client.get("/ready").status_code == 200)
        status = Path(f"/proc/{server.process.pid}/status")

        def resident() -> int:
            found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
            assert found is not None
            return int(found[1]) << 10

        before, seen, over = resident(), [0], threading.Event()

        def watch() -> None:
            while not over.wait(0.01):
                seen.append(resident())

        with ThreadPoolExecutor(5) as pool:
            watching = pool.submit(watch)
            body = {"prompt": "x", "n": 16, "max_tokens": 200, "ignore_eos": True}
            answers = list(pool.map(lambda i: server.client.post(PATH, json={**body, "seed": i}), range(4)))
            over.set()
            watching.result()
        assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [3200] * 4
        assert max(seen) - before < limit
        found = figures(server.client.get("/metrics").text)
        assert found["herd_token_seconds_count"] == 4 * 16 * 199  # of each answer, all tokens but the first
        assert found["herd_preemptions_total"] > 0
        assert found["herd_cache_pages_used"] == 0 and 8 < found["herd_cache_pages"] * 64 * 6144 / (1 << 20) < 20
        assert before < found["process_resident_memory_bytes"] <= max(seen) + (8 << 20)
    finally:
        server.close()


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("draft", [False, True])
def test_a_model_takes_no_more_than_it_may(model_path: Path, backend: str, draft: bool) -> None:
    """With the smaller model beside it. What is refused says how much there must be, and with that it is enough."""
    how: dict[str, Any] = {"backend": backend, "draft": model_path if draft else None, "threads": 1}
    with pytest.raises(OutOfMemory) as refused:
        LLM(model_path, memory=1 << 20, **how)
    needed = refused.value.needed
    if not draft:
        with pytest.raises(OutOfMemory):
            LLM(model_path, memory=needed - 1, **how)
    if draft:
        with pytest.raises(OutOfMemory) as refused:
            LLM(model_path, memory=needed, **how)
        needed = refused.value.needed
    for limit in (needed, 2 * needed):
        with LLM(model_path, memory=limit, **how) as llm:
            assert limit // 3 < llm.memory <= limit
            assert llm.generate("x", max_tokens=3, ignore_eos=True).usage.completion_tokens == 3


def test_weights_count_as_they_are_held(make_model: Callable[..., Path]) -> None:
    model = make_model(dim=512, ffn_dim=2048)
    with LLM(model, threads=1, memory=200 << 20) as whole, LLM(model, "q8_0", threads=1, memory=200 << 20) as small:
        assert whole.memory - small.memory > 8 << 20


def test_models_that_fit_beside_each_other_stay(serving: Any, model_path: Path, other_path: Path) -> None:
    config = ServeConfig(port=0, memory=2 * memory_for(model_path))
    with serving({"tiny": model_path, "other": other_path}, config) as served, served.client() as client:
        for name in ("other", "tiny", "other"):
            assert client.post(PATH, json={"model": name, "prompt": "x", "max_tokens": 2}).status_code == 200
        assert [model.name for model in served.registry.loaded] == ["tiny", "other"]
        assert sum(model.llm.memory for model in served.registry.loaded) <= (config.memory or 0)


def test_one_that_never_fits_makes_nobody_way(
    serving: Any, model_path: Path, make_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    large = make_model(context_length=512, dim=1024, ffn_dim=2048)
    config = ServeConfig(port=0, memory=2 * memory_for(model_path))
    assert memory_for(large) > (config.memory or 0)
    with serving({"tiny": model_path, "large": large}, config) as served, served.client() as client:
        refused = client.post(PATH, json={"model": "large", "prompt": "x"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "load_failed"
        assert [model.name for model in served.registry.loaded] == ["tiny"]
    assert "MiB of memory (weights" in caplog.text and "raise --memory" in caplog.text


def test_each_process_of_several_says_what_it_takes() -> None:
    page = Metrics(lambda: ()).page()
    lines = merged(page, {0: page, 1: page}).decode().splitlines()
    found = [line.split()[0] for line in lines if line.startswith("process_resident_memory_bytes{")]
    assert found == [f'process_resident_memory_bytes{{replica="{name}"}}' for name in ("0", "1", "front")]
