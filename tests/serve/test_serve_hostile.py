"""Requests that nobody sends in good faith: no status of 500, no dead process, and the server answers all the while."""

from __future__ import annotations

import hashlib
import json
import random
import re
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.serve.hostile_requests import Hostile, Sent
from tests.serve.program import Program, until

KEYS = ["key-of-alice", "key-of-bob"]
CALLERS = 4
HEALTH_S = 0.1
"""For an answer of /health, at most."""
TRIES = 3
Span = tuple[float, float]


@pytest.fixture
def program(model_path: Path, tmp_path: Path) -> Iterator[Program]:
    """A server with all that is optional: two keys, and a store."""
    keys = {name: {"sha256": hashlib.sha256(name.encode()).hexdigest()} for name in KEYS}
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    found = Program(
        f"tiny={model_path}", "--store", tmp_path / "kept.db", "--api-keys", tmp_path / "keys.json", "--threads", 1,
        "--deadline", 20, key=KEYS[0],
    )  # fmt: skip
    try:
        until(lambda: found.client.get("/ready").status_code == 200)
        yield found
    finally:
        found.close()


def send(address: tuple[str, int], asked: Sent, cut: float | None) -> tuple[int, bytes] | None:
    """Status and body; None where the connection was cut. `cut`: go away after this share of the request."""
    lines = [f"{asked.method} {asked.target} HTTP/1.1", *(f"{name}: {value}" for name, value in asked.headers.items())]
    lines += [f"Content-Length: {len(asked.body)}", "Connection: close", "", ""]
    data = "\r\n".join(lines).encode("utf-8") + asked.body
    with socket.create_connection(address, timeout=60) as raw:
        try:
            if cut is not None:
                raw.sendall(data[: int(cut * len(data))])
                return None
            raw.sendall(data)
            head, _, body = raw.makefile("rb").read().partition(b"\r\n\r\n")
        except ConnectionError:
            return None
    assert head, f"closed without an answer: {asked}"
    return int(head.split()[1]), body


class Attack:
    """What `count` requests of several callers gave: statuses by route, and fields that never came."""

    def __init__(self, program: Program, count: int) -> None:
        parts = urlsplit(program.url)
        self._address = (str(parts.hostname), int(parts.port or 0))
        self._description = program.client.get("/openapi.json").json()
        self._sent: list[tuple[Span, Sent, float | None]] = []
        self._failures: list[str] = []
        self._lock = threading.Lock()
        self.statuses: Counter[tuple[tuple[str, str], int]] = Counter()
        self.missing = Hostile(self._description, random.Random(), KEYS).fields
        health = self._watched([partial(self._call, seed, count // CALLERS) for seed in range(CALLERS)])
        seconds = [end - start for start, end in health]
        by_status: Counter[int] = Counter()
        for (_, status), times in self.statuses.items():
            by_status[status] += times
        usual, most = statistics.median(seconds), max(seconds)
        print(f"\n{count} requests: {dict(by_status)}")
        print(f"/health took {usual * 1000:.0f} ms usually, {most * 1000:.0f} ms at most")
        assert usual < HEALTH_S
        for span in health:
            if span[1] - span[0] >= HEALTH_S:
                self._try_again(span)
        assert not self._failures, self._failures[:3]

    def _watched(self, works: list[Callable[[], None]]) -> list[Span]:
        """Do all this at once; the times from asking for /health to its answer meanwhile."""
        over = threading.Event()
        with ThreadPoolExecutor(len(works) + 1) as pool:
            watch = pool.submit(self._watch, over)
            done = [pool.submit(work) for work in works]
            wait(done)
            over.set()
        for work in done:
            work.result()
        return watch.result()

    def _watch(self, over: threading.Event) -> list[Span]:
        health = Sent(("GET", "/health"), "GET", "/health", {"Host": "localhost"}, b"")
        spans: list[Span] = []
        while not over.wait(0.01):
            start = time.perf_counter()
            if (got := send(self._address, health, None)) != (200, b'{"status":"ok"}'):
                self._failures.append(f"/health: {got}")
            spans.append((start, time.perf_counter()))
        return spans

    def _try_again(self, span: Span) -> None:
        """Another process may have held the processor for so long; if a request of that time did, it does again."""
        suspects = [(asked, cut) for (start, end), asked, cut in self._sent if start < span[1] and end > span[0]]
        again = [partial(self._send, asked, cut) for asked, cut in suspects]
        if all(any(end - start >= HEALTH_S for start, end in self._watched(again)) for _ in range(TRIES)):
            self._failures.append(f"/health waits for one of these: {suspects}")

    def _call(self, seed: int, count: int) -> None:
        rng = random.Random(seed)
        hostile = Hostile(self._description, rng, KEYS)
        for asked in hostile.requests(count):
            cut = rng.random() if rng.random() < 0.03 else None
            start = time.perf_counter()
            got = self._send(asked, cut)
            with self._lock:
                self._sent.append(((start, time.perf_counter()), asked, cut))
                if got is not None:
                    self.statuses[asked.route, got[0]] += 1
            found = re.search(rb'"(resp_[0-9a-f]+)"', b"" if got is None else got[1])
            if found and asked.route == ("POST", "/v1/responses"):
                hostile.kept.append(found[1].decode())
        with self._lock:
            self.missing -= hostile.made

    def _send(self, asked: Sent, cut: float | None) -> tuple[int, bytes] | None:
        got = send(self._address, asked, cut)
        if got is not None and got[0] >= 500 and got[0] != 503:
            self._failures.append(f"{got[0]} {got[1][:300]!r}: {asked}")
        return got


def check(program: Program, count: int) -> Attack:
    attack = Attack(program, count)
    assert not attack.missing, attack.missing
    good = program.client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2})
    assert good.status_code == 200, good.text
    program.process.terminate()
    assert program.process.wait(60) == 0
    return attack


def test_hostile_requests(program: Program) -> None:
    attack = check(program, 2000)
    routes = {route for route, _ in attack.statuses}
    assert {route for route, status in attack.statuses if status == 200} == routes, "each is answered too"
    refused = sum(times for (_, status), times in attack.statuses.items() if status == 400)
    answered = sum(times for (_, status), times in attack.statuses.items() if status == 200)
    assert refused > 200 and answered > 200, (refused, answered)


@pytest.mark.slow
def test_ten_thousand_hostile_requests(program: Program) -> None:
    check(program, 10_000)
