"""Which replica a request goes to: a pure function of what was asked before and of the loads."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

pytest.importorskip("orjson")

from hypothesis import given, settings
from hypothesis import strategies as st

from herd.serve.replicas import PrefixRouter, beginning, blocks_of
from herd.serve.replicas.prefix_router import BLOCK, MOST_BLOCKS, SLACK

SYSTEM = "You are a herd of llamas, and answer in rhymes. " * 20


def chat(*turns: str, **more: object) -> bytes:
    messages = [{"role": "system", "content": SYSTEM}, *({"role": "user", "content": turn} for turn in turns)]
    return beginning({"messages": messages, **more})


@given(st.binary(max_size=4 * BLOCK), st.binary(max_size=4 * BLOCK))
def test_blocks_agree_as_far_as_texts_do(a: bytes, b: bytes) -> None:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    equal = [x == y for x, y in zip(blocks_of(a), blocks_of(b), strict=False)]
    assert len(blocks_of(a)) == len(a) // BLOCK
    assert equal == [(i + 1) * BLOCK <= same for i in range(len(equal))]


def test_a_block_is_known_by_all_before_it() -> None:
    a, b, c = (bytes([letter]) * BLOCK for letter in b"abc")
    assert blocks_of(a + c)[1] != blocks_of(b + c)[1]
    assert blocks_of(a, b"one") != blocks_of(a, b"two")
    assert len(blocks_of(a * (MOST_BLOCKS + 9))) == MOST_BLOCKS


def test_the_beginning_is_in_the_order_of_the_prompt() -> None:
    """Whatever the order of the fields, and whatever else the request says."""
    one = beginning({"temperature": 1, "messages": [1], "tools": [2], "model": "m"})
    assert one == beginning({"model": "m", "tools": [2], "messages": [1], "seed": 3}) == b'["m",[2],[1]]'
    assert beginning({"input": "x" * 10**6}).startswith(b'["xxx') and beginning({}) == b"[]"
    assert len(beginning({"input": "x" * 10**6})) == BLOCK * MOST_BLOCKS
    deep = json.loads("[" * 400 + "]" * 400)
    assert beginning({"messages": deep}) == b""


def test_a_conversation_stays_where_it_is() -> None:
    router = PrefixRouter(4)
    idle = dict.fromkeys(range(4), 0)
    homes = {}
    for name in ("ann", "ben", "cat", "dan"):  # what differs comes after the system prompt, which is of several blocks
        homes[name] = router.choose(beginning({"system": name * BLOCK, "messages": []}), idle)
    assert sorted(homes.values()) == [0, 1, 2, 3]  # who begins anew goes to who was not chosen for the longest time
    for length in range(5):
        for name, home in homes.items():
            turns = [{"role": "user", "content": "and then? " * 30}] * length
            for _ in range(2):
                assert router.choose(beginning({"system": name * BLOCK, "messages": turns}), idle) == home


def test_the_longest_match_wins() -> None:
    router = PrefixRouter(2)
    first = router.choose(chat("a" * 600), {0: 0, 1: 0})
    other = router.choose(chat("b" * 600), {first: SLACK + 1, 1 - first: 0})
    assert other != first
    for _ in range(2):
        assert router.choose(chat("a" * 600, "more"), {0: 0, 1: 0}) == first
    for _ in range(2):
        assert router.choose(chat("b" * 600, "more"), {0: 0, 1: 0}) == other
    assert router.choose(chat("c" * 600), {first: 1, other: 0}) == other  # both know the system prompt


def test_nothing_is_worth_waiting_long_for() -> None:
    router = PrefixRouter(2)
    home = router.choose(chat(), {0: 0, 1: 0})
    assert router.choose(chat(), {home: SLACK, 1 - home: 0}) == home
    assert router.choose(chat(), {home: SLACK + 1, 1 - home: 0}) == 1 - home


def test_who_was_started_again_knows_nothing() -> None:
    router = PrefixRouter(2)
    home = router.choose(chat(), {0: 0, 1: 0})
    router.forget(home)
    assert len(router._seen[home]) == 0
    assert router.choose(chat(), {home: 1, 1 - home: 0}) == 1 - home
    with pytest.raises(ValueError, match="empty"):
        router.choose(chat(), {})


STEPS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 6), st.lists(st.integers(0, 3), max_size=3)), min_size=1, max_size=80
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 6), STEPS)
def test_loads_and_memory_are_bounded(replicas: int, slack: int, steps: list[tuple[int, int, list[int]]]) -> None:
    """Whatever comes, goes and dies: nobody is chosen who is busier than allowed, and not too much is remembered."""
    router = PrefixRouter(replicas, slack=slack, memory=1)
    least = 4 * MOST_BLOCKS
    loads: dict[int, int] = defaultdict(int, dict.fromkeys(range(replicas), 0))
    for who, length, ends in steps:
        text = bytes([who]) * BLOCK * (1 + length * 50)
        chosen = router.choose(text, loads)
        assert loads[chosen] <= min(loads.values()) + slack
        loads[chosen] += 1
        for end in ends:
            if end < replicas and loads[end]:
                loads[end] -= 1
        assert all(len(router._seen[each]) <= least for each in range(replicas))


def test_what_is_used_stays_in_memory() -> None:
    router = PrefixRouter(2, memory=1)
    idle = {0: 0, 1: 0}
    home = router.choose(chat(), idle)
    for number in range(100):
        other = bytes([number]) * BLOCK * 200
        router.choose(other, {home: 0, 1 - home: SLACK + 1})
        assert router.choose(chat(), {home: 1, 1 - home: 0}) == home
    assert len(router._seen[home]) == 4 * MOST_BLOCKS


def test_beginnings_are_remembered_longer_than_what_follows() -> None:
    router = PrefixRouter(2, memory=1)
    texts = [bytes([number]) * BLOCK * MOST_BLOCKS for number in range(4)]
    home = router.choose(texts[0], {0: 0, 1: 0})
    for text in (*texts[1:], b"x" * BLOCK * (MOST_BLOCKS // 2)):
        router.choose(text, {home: 0, 1 - home: SLACK + 1})
    assert router.choose(texts[0], {home: 1, 1 - home: 0}) == home
