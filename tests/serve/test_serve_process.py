"""`herd serve` as a program: where it listens, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from herd.cli import main

httpx = pytest.importorskip("httpx2")

LONG = {"messages": [{"role": "user", "content": "tell me all"}], "max_tokens": 480, "ignore_eos": True}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "herd", "serve", *map(str, arguments)]


class Program:
    """A server in a process of its own, ready for requests."""

    def __init__(self, *arguments: object) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command(*arguments, "--port", 0, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        lines = ""
        for line in self.process.stdout:
            lines += line
            if line.startswith("}"):
                break
        assert lines, self.process.stderr.read() if self.process.stderr else ""
        self.said = json.loads(lines)
        self.url: str = self.said["url"]
        end = time.monotonic() + 60
        key = arguments[arguments.index("--api-key") + 1] if "--api-key" in arguments else "none"
        self.headers = {"authorization": f"Bearer {key}"}
        while httpx.get(self.url + "/ready", headers=self.headers).status_code != 200:
            assert time.monotonic() < end and self.process.poll() is None
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """Its exit code, and what it wrote to standard error."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.fixture
def program(model_path: Path) -> Iterator[Any]:
    started: list[Program] = []

    def start(*arguments: object) -> Program:
        started.append(Program(f"tiny={model_path}", *arguments))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()


def test_an_idle_server_ends_at_once(program: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        server = program()
        assert server.said["models"] == ["tiny"] and server.url.startswith("http://127.0.0.1:")
        start = time.monotonic()
        server.process.send_signal(number)
        code, errors = server.end()
        assert code == 0 and time.monotonic() - start < 10 and "Traceback" not in errors


def test_answers_end_before_the_server(program: Any) -> None:
    """New requests are refused meanwhile, and a stream in its course is whole."""
    server = program("--grace", 60)
    begun: list[int] = []
    ends: list[str] = []

    def ask() -> None:
        with httpx.stream(
            "POST", server.url + "/v1/chat/completions", json={**LONG, "stream": True}, timeout=60
        ) as got:
            last = ""
            begun.append(1)
            for line in got.iter_lines():
                last = line or last
            ends.append(last)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(begun) < 8:
        time.sleep(0.005)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    try:
        refused = httpx.post(server.url + "/v1/chat/completions", json=LONG, timeout=20)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert httpx.get(server.url + "/ready").status_code == 503
    except httpx.TransportError:
        pass  # it had nothing left to do
    for thread in threads:
        thread.join(60)
    assert ends == ["data: [DONE]"] * 8
    code, errors = server.end()
    assert code == 0 and "Traceback" not in errors


def test_grace_is_over_some_time(program: Any) -> None:
    """What still runs then ends with an error that says so; the program ends well."""
    server = program("--grace", 0)
    lines: list[str] = []
    with httpx.stream("POST", server.url + "/v1/chat/completions", json={**LONG, "stream": True}, timeout=60) as got:
        for line in got.iter_lines():
            if not lines:
                server.process.send_signal(signal.SIGTERM)
            lines += [line] if line else []
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "stopped" or lines[-1] == "data: [DONE]"
    code, errors = server.end()
    assert code == 0 and "Traceback" not in errors


def test_what_is_refused_at_the_start(model_path: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, code, text in (
            ((model_path, "--host", "0.0.0.0"), 2, "--api-key"),
            ((model_path, "--api-key", "short"), 2, "no key"),
            ((model_path, "--port", port), 4, "--port"),
            ((model_path, "--port", 99_999), 2, "port"),
            ((model_path, "--grace", -1), 2, "grace"),
            ((tmp_path / "nothing",), 3, "nothing"),
            ((f"a={model_path}", f"a={model_path}"), 2, "same name"),
            ((f"-x={model_path}", "--memory", "lots"), 2, ""),
            ((model_path, "--memory", "lots"), 2, "no size"),
        ):
            done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60)
            assert done.returncode == code and text in done.stderr and "Traceback" not in done.stderr, arguments
            assert "short" not in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--quant", "q9"), 2, "--quant is not valid; got q9; allowed: "),
        (("--kv", "q4"), 2, "--kv is not valid; got q4; allowed: bf16, f32, int8"),
        (("--ctx", 0), 2, "--ctx is out of range; got 0; allowed: "),
        (("--ctx", 513), 2, "--ctx is beyond the context of the model tiny; got 513; allowed: 1 to 512"),
        (("--threads", 0), 2, "--threads is out of range; got 0; allowed: "),
        (("--cpus", 1023), 2, "--cpus: no such processor for this process; got 1023; allowed: "),
        (("--cpus", "0,x"), 2, "--cpus is no list of numbers; got 0,x; allowed: "),
        (("--backend", "cuda"), 2, "--backend is not valid; got cuda; allowed: auto, native, torch"),
        (("--draft", "nope"), 3, "--draft: "),
        (("--allow-host", "a:80"), 2, "--allow-host is not valid; got a:80; allowed: a name or an address alone"),
        (("--max-queue", -1), 2, "--max-queue is not valid; got -1; allowed: "),
    ],
)
def test_wrong_options_are_told_once_and_before_the_port_is_open(
    options: tuple[object, ...], code: int, said: str, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", f"tiny={model_path}", "--port", "0", *map(str, options)])
    out, errors = capsys.readouterr()
    assert ended.value.code == code and out == "" and "http://" not in errors
    assert errors.startswith(f"herd: {said}") and errors.count("\n") == 1


def test_the_log_says_nothing_of_what_was_said(program: Any) -> None:
    server = program("--api-key", "a-key-of-some-length")
    headers = server.headers
    body = {"messages": [{"role": "user", "content": "a secret word"}], "max_tokens": 3}
    assert httpx.post(server.url + "/v1/chat/completions", json=body, headers=headers).status_code == 200
    assert httpx.post(server.url + "/v1/chat/completions", json={**body, "x": 1}, headers=headers).status_code == 400
    server.process.send_signal(signal.SIGTERM)
    code, errors = server.end()
    assert code == 0 and "secret word" not in errors and "a-key-of-some-length" not in errors


def test_a_model_that_cannot_be_loaded_ends_the_server(model_path: Path, tmp_path: Path) -> None:
    """There is nothing to serve; the reason is the last word, and the exit code is that of a damaged file."""
    damaged = shutil.copytree(model_path, tmp_path / "damaged")
    (weights,) = damaged.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    ended = subprocess.run(command(damaged, "--port", "0"), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 3, ended.stderr
    assert weights.name in ended.stderr.splitlines()[-1] and "Traceback" not in ended.stderr
    assert ended.stderr.count(weights.name) == 1
