"""`herd serve --replicas 2` in a Ray cluster of two nodes, one of which dies and is replaced.

Both nodes are on this machine, each with a raylet of its own and one processor, so that a replica fits on each and no
two on one. Where a replica is, its process's parent says, which is its node's raylet.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.serve")
httpx = pytest.importorskip("httpx2")

import herd  # noqa: E402
from tests.serve.program import Program, until  # noqa: E402
from tests.serve.ray_nodes import Nodes, environment  # noqa: E402

pytestmark = pytest.mark.slow
CHAT = "/v1/chat/completions"
SHORT: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
LONG: dict[str, Any] = {"max_tokens": 1200, "ignore_eos": True, "stream": True, "n": 8, "temperature": 1.0}


def asking(i: int) -> list[Any]:
    """A dialogue that no replica knows the beginning of."""
    return [{"role": "user", "content": f"{i} is my number. " + f"word{i} " * 20}]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model(talkative=True, context_length=2048)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    yield found
    found.close()


@pytest.fixture(scope="module")
def program(nodes: Nodes, model: Path) -> Iterator[Program]:
    started = Program(
        f"tiny={model}", "--replicas", 2, "--threads", 1, environment=environment(RAY_ADDRESS=nodes.address)
    )
    try:
        until(lambda: ready(started) == 2)
        yield started
    finally:
        started.close()


def ready(program: Program) -> int:
    """So many replicas are."""
    answer = program.client.get("/ready")
    return int(answer.json()["replicas"]) if answer.status_code == 200 else 0


def figures(program: Program, name: str) -> dict[str, float]:
    """The sums over all samples whose names and labels begin so, by replica."""
    found: dict[str, float] = {}
    for line in program.client.get("/metrics").text.splitlines():
        if line.startswith(name):
            number = line.partition('replica="')[2].partition('"')[0]
            found[number] = found.get(number, 0.0) + float(line.rpartition(" ")[2])
    return found


def check_answers(program: Program, model: Path, numbers: range) -> None:
    """They are those of one process."""
    with herd.LLM(model, threads=1) as llm:
        for i in numbers:
            answer = program.client.post(CHAT, json={"messages": asking(i), **SHORT})
            assert answer.status_code == 200, answer.text
            expected = llm.chat(asking(i), skip_specials=True, **SHORT).text
            assert answer.json()["choices"][0]["message"]["content"] == expected


def test_each_node_has_a_replica_and_both_answer(nodes: Nodes, program: Program, model: Path) -> None:
    assert [len(pids) for pids in nodes.replicas()] == [1, 1]
    check_answers(program, model, range(6))
    told = figures(program, 'herd_tokens_total{kind="completion"')
    assert told == {"0": 3 * 12, "1": 3 * 12}


def test_a_node_dies_and_requests_go_on(nodes: Nodes, program: Program, model: Path) -> None:
    """What ran there says so, what runs elsewhere is whole, and whatever comes is answered."""
    ends: list[str] = []
    (kept,), (lost,) = nodes.replicas()

    def read(i: int) -> None:
        body = {"messages": asking(100 + i), **LONG}
        with httpx.stream("POST", f"{program.url}{CHAT}", json=body, timeout=300) as got:
            ends.append(got.read().decode().strip("\n").rpartition("\n")[2])

    threads = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: figures(program, "herd_running_requests") == {"0": 1, "1": 1})
    nodes.kill_last()
    check_answers(program, model, range(10, 15))
    until(lambda: ready(program) == 1)
    check_answers(program, model, range(20, 25))
    for thread in threads:
        thread.join(300)
    assert sorted("replica_lost" in end for end in ends) == [False, True] and "data: [DONE]" in ends, ends
    assert nodes.replicas() == [[kept]] and not Path(f"/proc/{lost}").exists()


def test_a_new_node_gets_the_replica_that_is_missing(nodes: Nodes, program: Program, model: Path) -> None:
    nodes.add()
    until(lambda: ready(program) == 2)
    assert [len(pids) for pids in nodes.replicas()] == [1, 1]
    check_answers(program, model, range(30, 34))
    assert set(figures(program, 'herd_tokens_total{kind="completion"')) == {"0", "1"}


def test_the_cluster_outlives_the_server(nodes: Nodes, program: Program) -> None:
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(60) == 0
    until(lambda: nodes.replicas() == [[], []], 30)
    assert all(Path(f"/proc/{raylet}").exists() for raylet in nodes.raylets)
    assert "is my number" not in "".join(program.errors)
