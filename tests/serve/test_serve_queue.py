"""The queue between keys: nobody starves, shares follow weights, and nothing of what has gone stays."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

FairQueue = pytest.importorskip("herd.serve.queue").FairQueue


@dataclass(eq=False)
class Job:
    owner: str
    cost: int = 1
    weight: float = 1.0
    arrived: float = 0.0


def drain(queue: Any) -> list[Job]:
    out = []
    while (job := queue.pop()) is not None:
        out.append(job)
    return out


def test_one_key_is_served_in_order() -> None:
    queue: Any = FairQueue()
    jobs = [Job("a", cost) for cost in (5, 1, 9, 2)]
    for job in jobs:
        queue.put(job)
    assert drain(queue) == jobs and len(queue) == 0 and queue.pop() is None


def test_a_flood_delays_others_by_one_job() -> None:
    queue: Any = FairQueue()
    for _ in range(1000):
        queue.put(Job("flood", 10))
    queue.pop()
    late = Job("late", 10)
    queue.put(late)
    assert late in (queue.pop(), queue.pop())


def test_shares_follow_weights_and_costs() -> None:
    queue: Any = FairQueue()
    for _ in range(300):
        queue.put(Job("light", 10, 1.0))
        queue.put(Job("heavy", 10, 3.0))
        queue.put(Job("long", 20, 1.0))
    served: Counter[str] = Counter()
    for _ in range(200):
        job = queue.pop()
        assert job is not None
        served[job.owner] += job.cost
    assert abs(served["heavy"] / served["light"] - 3) < 0.2
    assert abs(served["long"] / served["light"] - 1) < 0.2


def test_who_was_away_has_no_claim_to_the_past() -> None:
    queue: Any = FairQueue()
    for _ in range(100):
        queue.put(Job("a"))
    for _ in range(50):
        queue.pop()
    for _ in range(100):
        queue.put(Job("b"))
    first = [job.owner for job in drain(queue)[:20]]
    assert 8 <= first.count("a") <= 12


@given(
    st.lists(st.tuples(st.sampled_from(["put", "pop", "remove"]), st.integers(0, 3), st.integers(1, 50)), max_size=300)
)
def test_nothing_is_lost_or_doubled(steps: list[tuple[str, int, int]]) -> None:
    queue: Any = FairQueue()
    inside: list[Job] = []
    for what, who, cost in steps:
        if what == "put":
            job = Job("abcd"[who], cost)
            queue.put(job)
            inside.append(job)
        elif what == "pop":
            job_or_none = queue.pop()
            assert (job_or_none is None) == (not inside)
            if job_or_none is not None:
                inside.remove(job_or_none)
        elif inside:
            job = inside.pop(cost % len(inside))
            assert queue.remove(job) and not queue.remove(job)
        assert len(queue) == len(inside) and set(map(id, queue.jobs())) == set(map(id, inside))
    assert Counter(map(id, drain(queue))) == Counter(map(id, inside))


def test_what_was_taken_back_is_not_charged() -> None:
    queue: Any = FairQueue()
    for _ in range(20):
        queue.put(Job("other", 10))
    taken = [Job("mine", 100) for _ in range(50)]
    for job in taken:
        queue.put(job)
    for job in taken:
        queue.remove(job)
    mine = Job("mine", 10)
    queue.put(mine)
    assert mine in (queue.pop(), queue.pop())


def test_who_comes_and_goes_leaves_nothing() -> None:
    queue: Any = FairQueue()
    queue.put(Job("stays"))
    for _ in range(10_000):
        job = Job("goes")
        queue.put(job)
        queue.remove(job)
    assert len(queue._heap) < 200


def test_who_waits_again_has_not_come_again() -> None:
    """The newest of a key is the one that arrived last, whose turn may have come before."""
    queue: Any = FairQueue()
    first, second, third = (Job("greedy", arrived=when) for when in (1.0, 2.0, 0.5))
    queue.put(first)
    queue.put(second)
    assert queue.pop() is first
    queue.put(first)
    queue.put(third)
    assert queue.last_of_the_longest(than="modest") is second
