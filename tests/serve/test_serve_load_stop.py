"""The end while a model is being loaded: nobody waits for what nobody will use."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from herd.serve import Registry, ServeConfig
from herd.serve.errors import ApiError
from herd.serve.pools import Daemon

# A model whose path has "slow" in it takes longer to load than any test waits.
PROGRAM = """
import sys, time
import herd.serve.registry as registry
load = registry.LLM
def slowly(path, **more):
    if "slow" in str(path):
        print("loading", file=sys.stderr, flush=True)
        time.sleep(300)
    return load(path, **more)
registry.LLM = slowly
from herd.cli import main
main()
"""

STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    while STARTED:
        STARTED.pop().kill()


@pytest.fixture
def slow_path(model_path: Path, tmp_path: Path) -> Path:
    found = tmp_path / "slow"
    found.mkdir()
    for file in model_path.iterdir():
        (found / file.name).symlink_to(file)
    return found


def start(*models: Path) -> tuple[subprocess.Popen[str], str]:
    """The process, and its address."""
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        "serve",
        *map(str, models),
        "--port",
        "0",
        "--grace",
        "1",
        "--threads",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    STARTED.append(process)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("http"), process.stderr
    return process, line.split()[0]


def until_it_loads(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    assert any(line == "loading\n" for line in process.stderr)


def ended(process: subprocess.Popen[str]) -> str:
    """Its standard error, when it has ended as it should."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and time.monotonic() - began < 30
    assert "Traceback" not in errors, errors
    return errors


def test_a_server_ends_while_its_first_model_is_loaded(slow_path: Path) -> None:
    process, _ = start(slow_path)
    until_it_loads(process)
    ended(process)


def test_who_waits_for_a_model_is_told_of_the_end(model_path: Path, slow_path: Path) -> None:
    process, url = start(model_path, slow_path)
    end = time.monotonic() + 60
    while httpx.get(url + "/ready").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.05)
    answers: list[Any] = []

    def ask() -> None:
        body = {"model": "slow", "prompt": "x", "max_tokens": 2}
        answers.append(httpx.post(url + "/v1/completions", json=body, timeout=60))

    asking = threading.Thread(target=ask)
    asking.start()
    until_it_loads(process)
    ended(process)
    asking.join(10)
    assert [answer.status_code for answer in answers] == [503]
    assert answers[0].json()["error"]["code"] == "draining"


def test_a_model_that_comes_too_late_is_closed(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    go, made = threading.Event(), []
    from herd.serve import registry as module

    load = module.LLM

    def late(path: Path, **more: Any) -> Any:
        go.wait(30)
        made.append(load(path, **more))
        return made[-1]

    monkeypatch.setattr(module, "LLM", late)

    async def work() -> None:
        registry = Registry({"tiny": model_path, "other": model_path}, ServeConfig(port=0), {"threads": 1})
        asking = asyncio.create_task(registry.get("other"))
        while not registry.loading:
            await asyncio.sleep(0.01)
        began = time.monotonic()
        await registry.drain(0.0)
        with pytest.raises(ApiError, match="about to stop") as refused:
            await asking
        assert refused.value.status == 503 and time.monotonic() - began < 10
        with pytest.raises(ApiError, match="about to stop"):
            await registry.get("tiny")
        go.set()
        with pytest.raises(ApiError):
            await registry.load("other")
        assert not registry.loading and not registry.loaded
        with pytest.raises(Exception, match="closed"):
            made[0].generate("x")

    asyncio.run(work())


def test_work_of_a_daemon_gives_what_it_finds() -> None:
    def fails() -> None:
        raise KeyError("it")

    async def work() -> None:
        daemon = Daemon("test")
        assert await daemon.run(lambda: 3) == 3
        with pytest.raises(KeyError, match="it"):
            await daemon.run(fails)
        go = threading.Event()
        given_up = asyncio.create_task(daemon.run(lambda: go.wait(20)))
        await asyncio.sleep(0.02)
        given_up.cancel()
        await asyncio.sleep(0.02)
        assert daemon.working
        go.set()
        while daemon.working:
            await asyncio.sleep(0.01)

    asyncio.run(work())
