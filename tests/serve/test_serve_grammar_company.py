"""Requests beside grammars that are being compiled: served and given up in time, and none ends for another's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("llguidance")

from herd.engine import grammar_trial as trials
from herd.serve.driver import _COMPILING
from herd.serve.queue import FairQueue
from tests.serve.live_server import Served, until

PLAIN = {"prompt": "ab", "max_tokens": 1}
BOUND = {"prompt": "ab", "max_tokens": 6, "response_format": {"type": "regex", "grammar": "[a-f]{3}"}}
PATH = "/v1/completions"


class Compiler:
    """Nothing is compiled for answers until it is let to; then it may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = threading.Event()
        self.error: BaseException | None = None
        self._matcher = trials._matcher
        monkeypatch.setattr(trials, "_matcher", self.matcher)

    def matcher(self, *arguments: Any) -> Any:
        assert self.on.wait(20)
        error, self.error = self.error, None
        if error is not None:
            raise error
        return self._matcher(*arguments)


@pytest.fixture
def compiler(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    with served.client() as client:
        assert client.post(PATH, json=BOUND).status_code == 200  # known from here on
    compiler = Compiler(monkeypatch)
    yield compiler
    compiler.on.set()
    until(served.is_free)


def ask(served: Served, body: dict[str, Any]) -> Any:
    with served.client() as client:
        return client.post(PATH, json=body)


def test_many_answers_with_a_grammar_hold_up_nobody(served: Served, compiler: Compiler) -> None:
    with ThreadPoolExecutor(1) as pool:
        bound = pool.submit(ask, served, {**BOUND, "n": 16})
        until(lambda: served.llm.scheduler.preparing == 1)
        assert [ask(served, PLAIN).status_code for _ in range(3)] == [200] * 3
        until(lambda: served.driver.running == 1)  # the last one leaves after its reader has been told
        assert not bound.done()
        compiler.on.set()
        texts = [choice["text"] for choice in bound.result(20).json()["choices"]]
    assert len(texts) == 16 and all(len(text) == 3 and set(text) <= set("abcdef") for text in texts)


def test_more_requests_with_a_grammar_wait_in_the_queue_and_others_go_past(served: Served, compiler: Compiler) -> None:
    with ThreadPoolExecutor(_COMPILING + 3) as pool:
        bound = [pool.submit(ask, served, {**BOUND, "n": 2}) for _ in range(_COMPILING + 3)]
        until(lambda: served.driver.running == _COMPILING and served.driver.waiting == 3)
        assert ask(served, PLAIN).status_code == 200
        until(lambda: served.driver.running == _COMPILING)
        assert served.driver.waiting == 3
        compiler.on.set()
        assert [answer.result(20).status_code for answer in bound] == [200] * len(bound)


def test_who_leaves_or_is_late_is_seen_while_nothing_but_a_grammar_is_compiled(
    served: Served, compiler: Compiler
) -> None:
    began = time.monotonic()
    late = ask(served, {**BOUND, "timeout": 0.3})
    assert late.status_code == 400 and late.json()["error"]["code"] == "timeout_exceeded"
    gone = served.post(PATH, {**BOUND, "n": 3, "stream": True})
    until(lambda: served.driver.running == 1)
    gone.close()
    until(served.is_free, 5)
    assert time.monotonic() - began < 10 and not compiler.on.is_set()


def test_a_panic_while_a_grammar_is_compiled_ends_one_request(served: Served, compiler: Compiler) -> None:
    class Panic(BaseException):
        pass

    compiler.on.set()
    compiler.error = Panic("unreachable")
    failed = ask(served, BOUND)
    assert failed.status_code == 400 and "compiling it failed" in failed.json()["error"]["message"]
    assert served.driver.alive
    assert ask(served, BOUND).status_code == ask(served, PLAIN).status_code == 200


@dataclass(eq=False)
class Job:
    owner: str
    may_go: bool
    cost: int = 1
    weight: float = 1.0


def test_who_may_not_go_yet_keeps_its_turn() -> None:
    queue: FairQueue[Job] = FairQueue()
    jobs = [Job("a", False), Job("b", True), Job("a", True), Job("b", False), Job("c", False)]
    for job in jobs:
        queue.put(job)
    queue.remove(jobs[4])
    assert queue.pop(lambda job: job.may_go) is jobs[1]
    assert queue.pop(lambda job: job.may_go) is jobs[2]
    assert queue.pop(lambda job: job.may_go) is None and len(queue) == 2
    assert queue.pop() is jobs[0]
    late = Job("late", True)
    queue.put(late)  # it begins now, not when the one began that was kept
    assert [queue.pop(), queue.pop()] == [jobs[3], late]
    assert queue.pop() is None and len(queue) == 0
