"""`herd serve --replicas 2` as a program, with real processes: one server for all tests, which the last one ends."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.serve")
httpx = pytest.importorskip("httpx2")

KEYS = {"ann-has-a-key": {}, "ben-has-a-key": {"concurrent": 1}, "cat-has-a-key": {"tokens_per_minute": 60}}
CHAT = "/v1/chat/completions"
SAID = [{"role": "user", "content": "Who are you?"}]
LONG = {"messages": SAID, "max_tokens": 480, "ignore_eos": True, "stream": True, "n": 16, "temperature": 1.0}


class Program:
    """The server, and the processes that it has started."""

    def __init__(self, model: Path, folder: Path) -> None:
        keys = folder / "keys.json"
        hashed = {k[:3]: {"sha256": hashlib.sha256(k.encode()).hexdigest(), **v} for k, v in KEYS.items()}
        keys.write_text(json.dumps(hashed))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "herd", "serve", f"tiny={model}", "--port", "0", "--json", "--replicas", "2",
             "--threads", "1", "--api-keys", str(keys), "--store", str(folder / "store.db"), "--grace", "120"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.errors: list[str] = []
        assert self.process.stdout is not None and self.process.stderr is not None
        stderr = self.process.stderr
        threading.Thread(target=lambda: self.errors.extend(stderr), daemon=True).start()
        lines = ""
        while not lines.endswith("}\n"):
            lines += (line := self.process.stdout.readline())
            assert line, self.errors
        self.url: str = json.loads(lines)["url"]

    def client(self, key: str = "ann-has-a-key") -> Any:
        return httpx.Client(base_url=self.url, timeout=60, headers={"authorization": f"Bearer {key}"})

    def children(self) -> dict[int, str]:
        """Names by number, of all processes below it."""
        parents, names = {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    names[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return {pid: names[pid] for pid in found - {self.process.pid}}

    def listening(self) -> list[tuple[Any, int]]:
        """Addresses and ports at which it or a process below it listens."""
        owned = set()
        for pid in (self.process.pid, *self.children()):
            for entry in Path(f"/proc/{pid}/fd").glob("*"):
                with contextlib.suppress(OSError):
                    owned.add(str(entry.readlink()))
        found = []
        for table in ("tcp", "tcp6"):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in owned:
                    host, _, port = fields[1].partition(":")
                    words = bytes.fromhex(host)
                    raw = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                    address = ipaddress.ip_address(raw)
                    found.append((getattr(address, "ipv4_mapped", None) or address, int(port, 16)))
        return found

    def replicas(self) -> list[int]:
        return sorted(pid for pid, name in self.children().items() if name.startswith("ray::ServeReplica"))

    def figure(self, name: str) -> float:
        """The sum over all samples whose names and labels begin so."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def until(condition: Callable[[], object], seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def replicas(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    program = Program(model_path, tmp_path_factory.mktemp("replicas"))
    try:
        with program.client() as client:
            assert client.get("/health").json() == {"status": "ok"}
            until(lambda: client.get("/ready").status_code == 200)
            assert client.get("/ready").json() == {"status": "ready", "models": ["tiny"], "replicas": 2}
        yield program
    finally:
        program.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.process.wait(60)
        program.process.kill()


@pytest.fixture(scope="module")
def single(serving: Any, model_path: Path) -> Iterator[Any]:
    """The same in one process, loaded as the command does."""
    with serving({"tiny": model_path}, kv="bf16") as found:
        yield found


def facts(response: Any) -> Any:
    """What must not depend on where an answer comes from: all but identifiers and times."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in ("id", "created", "created_at", "cached_tokens")}
        return [plain(each) for each in value] if isinstance(value, list) else value

    if response.headers["content-type"].startswith("text/event-stream"):
        data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
        return [plain(json.loads(each)) for each in data], response.text.endswith("data: [DONE]\n\n")
    return response.status_code, plain(response.json())


ASKED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": SAID, "max_tokens": 40, "temperature": 0, "logprobs": True, "top_logprobs": 3}),
    (CHAT, {"messages": SAID, "max_tokens": 40, "temperature": 1.0, "seed": 7, "n": 3}),
    (CHAT, {"messages": SAID, "max_tokens": 40, "seed": 8, "stream": True, "stream_options": {"include_usage": True}}),
    (CHAT, {"messages": SAID, "max_tokenz": 1}),
    (CHAT, {"messages": SAID, "model": "another"}),
    (CHAT, {"messages": [{"role": "user", "content": "much " * 900}]}),
    ("/v1/completions", {"prompt": ["Once", "Twice"], "max_tokens": 9, "logprobs": 2, "echo": True, "seed": 1}),
    ("/v1/embeddings", {"input": ["one text", "and another"]}),
    ("/v1/messages", {"model": "tiny", "messages": SAID, "max_tokens": 12, "temperature": 0, "system": "Be short."}),
    ("/v1/messages", {"model": "tiny", "messages": SAID, "max_tokens": 12, "temperature": 0, "stream": True}),
    ("/tokenize", {"messages": SAID}),
]


@pytest.mark.parametrize(("path", "body"), ASKED)
def test_answers_are_those_of_one_process(path: str, body: dict[str, Any], replicas: Program, single: Any) -> None:
    with replicas.client() as many, single.client() as one:
        expected = facts(one.post(path, json=body))
        for _ in range(3):
            assert facts(many.post(path, json=body)) == expected
    if path == CHAT and body.get("seed"):
        assert "fp_" in json.dumps(expected)


def test_what_the_front_says_itself(replicas: Program, single: Any) -> None:
    with replicas.client() as many, single.client() as one:
        assert many.get("/openapi.json").json() == one.get("/openapi.json").json()
        assert many.get("/").headers["content-security-policy"]
        assert [model["id"] for model in many.get("/v1/models").json()["data"]] == ["tiny"]
        assert many.get("/v1/models/other").status_code == 404 and many.get("/nowhere").status_code == 404
        assert many.get(CHAT).status_code == 405
        assert many.post(CHAT, content=b"{", headers={"content-type": "application/json"}).status_code == 400
        assert many.get("/health", headers={"host": "evil.example"}).status_code == 403
    for path in ("/v1/models", "/metrics", "/ready"):
        assert httpx.get(replicas.url + path).status_code == 401


def test_the_start_says_what_it_waits_for(replicas: Program) -> None:
    assert "starting 2 replicas" in replicas.errors[0]
    until(lambda: {f"replica {n} is ready" for n in (0, 1)} <= {line[-19:].strip() for line in replicas.errors}, 10)


def test_beginnings_are_found_again(replicas: Program) -> None:
    """The turns of a conversation meet the replica that has computed what was said before, whoever asks meanwhile."""
    with replicas.client() as client:
        talks = {who: [{"role": "user", "content": f"I am {who}. " + f"{who} " * 90}] for who in ("Eva", "Fay", "Gus")}
        for turn in range(3):
            for messages in talks.values():
                got = client.post(CHAT, json={"messages": messages, "max_tokens": 4, "temperature": 0}).json()
                cached = got["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert cached > 90 if turn else cached < 40
                messages += [got["choices"][0]["message"], {"role": "user", "content": "Go on."}]
    for number in (0, 1):  # and yet both have had something to do
        assert replicas.figure(f'herd_tokens_total{{kind="prompt",model="tiny",replica="{number}"') > 0


def test_responses_are_kept_for_all(replicas: Program) -> None:
    with replicas.client() as client:
        first = client.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 16, "store": True}).json()
        for _ in range(4):  # both have their turn
            assert client.get(f"/v1/responses/{first['id']}").json() == first
            body = {"input": "More", "previous_response_id": first["id"], "max_output_tokens": 16}
            assert client.post("/v1/responses", json=body).status_code == 200
    with replicas.client("ben-has-a-key") as other:
        assert other.get(f"/v1/responses/{first['id']}").status_code == 404


def test_limits_hold_over_all(replicas: Program) -> None:
    """A key with one request at a time has one, wherever it runs; who goes away frees it, and their replica."""
    short = {"messages": SAID, "max_tokens": 2}
    gone = replicas.figure('herd_streams_total{end="disconnected"')
    with replicas.client("ben-has-a-key") as client:
        for _ in range(3):  # one after the other
            assert client.post(CHAT, json=short).status_code == 200
        with client.stream("POST", CHAT, json=LONG) as stream:
            next(stream.iter_lines())
            refused = client.post(CHAT, json=short)
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
        until(lambda: client.post(CHAT, json=short).status_code == 200, 10)
    assert replicas.figure('herd_streams_total{end="disconnected"') == gone + 1
    assert replicas.figure("herd_running_requests") == replicas.figure("herd_waiting_requests") == 0
    with replicas.client("cat-has-a-key") as client:
        assert client.post(CHAT, json={**short, "max_tokens": 60, "ignore_eos": True}).status_code == 200
        assert client.post(CHAT, json=short).status_code == 429


def test_nothing_is_open_to_others(replicas: Program) -> None:
    """All that listens, here and in Ray's processes, does so on this machine's own address; its files are closed."""
    found = replicas.listening()
    assert len(found) > 5 and all(address.is_loopback for address, _ in found), found
    folders = set(re.findall(r"(/tmp/herd-\w+)/", " ".join(replicas.children().values())))
    assert len(folders) == 1 and stat.S_IMODE(Path(folders.pop()).stat().st_mode) == 0o700


def test_nothing_is_told_without_a_key(replicas: Program) -> None:
    """Ray's figures would be there for all users of this machine."""
    told = []
    for address, port in replicas.listening():
        for path in ("/", "/metrics", "/api/version", "/nodes", "/logs"):
            with contextlib.suppress(httpx.HTTPError):  # most ports do not speak HTTP
                answer = httpx.get(f"http://{address}:{port}{path}", timeout=2)
                told.append((port, path, answer.status_code, answer.text[:80]))
    assert len(told) >= 5 and not [each for each in told if each[2] < 300], told


def test_replicas_are_as_nice_as_the_server(replicas: Program) -> None:
    nice = {name: os.getpriority(os.PRIO_PROCESS, pid) for pid, name in replicas.children().items()}
    own = os.getpriority(os.PRIO_PROCESS, replicas.process.pid)
    assert set(nice.values()) == {own}, nice


class Asking:
    """Four long requests at a time, all of which have begun; `join` gives the last line of each answer."""

    def __init__(self, program: Program, **more: object) -> None:
        self._program = program
        self._body = {**LONG, "n": 8, **more}
        self._ends: list[str] = []
        running = program.figure("herd_running_requests")
        self._threads = [threading.Thread(target=self._read) for _ in range(4)]
        for thread in self._threads:
            thread.start()
        until(lambda: program.figure("herd_running_requests") == running + 4)

    def _read(self) -> None:
        with self._program.client() as client, client.stream("POST", CHAT, json=self._body) as got:
            self._ends.append(got.read().decode().strip("\n").rpartition("\n")[2])

    def join(self) -> list[str]:
        for thread in self._threads:
            thread.join(120)
        return self._ends


def test_one_may_die(replicas: Program) -> None:
    """What it was doing says so, the other one does what comes, and it comes back."""
    before = replicas.replicas()
    assert len(before) == 2
    streams = Asking(replicas)
    wholes = Asking(replicas, stream=False)  # not tried again: it may have died of them
    os.kill(before[0], signal.SIGKILL)
    with replicas.client() as client:
        for _ in range(5):
            assert client.post(CHAT, json={"messages": SAID, "max_tokens": 2}).status_code == 200
        ends, told = streams.join(), [json.loads(each) for each in wholes.join()]
        assert sum("replica_lost" in each for each in ends) == 2 and ends.count("data: [DONE]") == 2, ends
        assert sum(each.get("error", {}).get("code") == "replica_lost" for each in told) == 2, told
        assert sum(each.get("usage", {}).get("completion_tokens") == 8 * 480 for each in told) == 2, told
        until(lambda: client.get("/ready").json().get("replicas") == 2)
    after = replicas.replicas()
    assert len(after) == 2 and before[1] in after and before[0] not in after


def test_the_end(replicas: Program) -> None:
    """Streams in their course are whole, new requests are refused, and no process is left."""
    below = replicas.children()
    streams = Asking(replicas, max_tokens=300)
    replicas.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    with replicas.client() as client, contextlib.suppress(httpx.TransportError):  # it may have nothing left to do
        refused = client.post(CHAT, json={"messages": SAID})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert client.get("/ready").status_code == 503
    assert streams.join() == ["data: [DONE]"] * 4
    assert replicas.process.wait(60) == 0
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), 30)
    log = "".join(replicas.errors)
    assert len(below) > 5 and "Traceback" not in log and "Who are you" not in log and "has-a-key" not in log, log
