"""Continuous batching, with a backend whose logits are an exact function of each sequence's history.

Such a backend has no rounding that depends on the batch, so any crowd must give to the token what a plain loop gives;
it also checks that the scheduler keeps its side of the contract.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.engine.backend import Span
from herd.engine.request import Chunk, Completion, Sampling
from herd.engine.sampler import SamplerRow, sample
from herd.engine.scheduler import PREFILL_TOKENS, LiveSequence, Scheduler

VOCABULARY = 40
STOP_ID = 39


def history_logits(history: Sequence[int]) -> np.ndarray:
    digest = hashlib.blake2b(np.asarray(history, np.int64).tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).normal(0, 2, VOCABULARY).astype(np.float32)


class HistoryBackend:
    """Logits from the hash of all tokens so far; room for a fixed number of sequences and tokens."""

    def __init__(self, max_sequences: int, max_tokens: int) -> None:
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.histories: dict[int, list[int]] = {}
        self.capacities: dict[int, int] = {}
        self.computed = 0
        self.largest_step = 0
        self.fail_at: int | None = None
        self._next = 0

    def reserve(self, capacity: int) -> int | None:
        full = len(self.histories) == self.max_sequences or sum(self.capacities.values()) + capacity > self.max_tokens
        if full and self.histories:
            return None
        self._next += 1
        self.histories[self._next] = []
        self.capacities[self._next] = capacity
        return self._next

    def fork(self, sequence: int, capacity: int) -> int | None:
        copy = self.reserve(capacity)
        if copy is not None:
            self.histories[copy] = list(self.histories[sequence])
        return copy

    def release(self, sequence: int) -> None:
        del self.histories[sequence], self.capacities[sequence]

    def step(self, spans: Sequence[Span]) -> np.ndarray:
        assert len({span.sequence for span in spans}) == len(spans)
        self.largest_step = max(self.largest_step, sum(len(span.tokens) for span in spans))
        for span in spans:
            assert span.tokens
            self.histories[span.sequence] += span.tokens
            self.computed += len(span.tokens)
            assert len(self.histories[span.sequence]) <= self.capacities[span.sequence]
        if self.fail_at is not None and self.computed >= self.fail_at:
            raise KeyboardInterrupt
        return np.stack([history_logits(self.histories[span.sequence]) for span in spans])


class Letters:
    """Token i reads as one letter; the test's own decoder."""

    def push(self, token_id: int) -> str:
        return chr(ord("A") + token_id)

    def flush(self) -> str:
        return ""


def alone(prompt: list[int], sampling: Sampling, max_tokens: int, seed: int) -> tuple[list[int], str]:
    """The definition: one token after the other, nothing shared."""
    row, history, ids = SamplerRow(sampling, seed, prompt), list(prompt), []
    while len(ids) < max_tokens:
        token_id = sample(history_logits(history)[None], [row])[0].token_id
        ids.append(token_id)
        history.append(token_id)
        text = "".join(chr(ord("A") + i) for i in ids)
        if token_id == STOP_ID and not sampling.ignore_eos:
            return ids, text[:-1]
        for stop in sampling.stop:
            if stop in text:
                return ids, text[: text.index(stop)]
    return ids, "".join(chr(ord("A") + i) for i in ids)


def add(scheduler: Scheduler, prompt: list[int], sampling: Sampling, **more: object) -> LiveSequence:
    return scheduler.add(prompt, sampling, decoder=Letters(), **more)  # type: ignore[arg-type]


def run(scheduler: Scheduler) -> None:
    for _ in range(10_000):
        if scheduler.idle:
            return
        scheduler.step()
    raise AssertionError("the scheduler does not come to an end")


REQUEST = st.tuples(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30),
    st.integers(1, 25),
    st.integers(0, 1000),
    st.sampled_from([{"temperature": 0.0}, {}, {"temperature": 1.0, "stop": "AB"}, {"stop": ["C"]}, {"top_k": 5}]),
)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=12),
    max_sequences=st.integers(1, 8),
    max_tokens=st.integers(10, 400),
    late=st.integers(0, 20),
)
def test_every_crowd_gives_what_a_plain_loop_gives(
    requests: list, max_sequences: int, max_tokens: int, late: int
) -> None:
    backend = HistoryBackend(max_sequences, max_tokens)
    scheduler = Scheduler(backend, frozenset([STOP_ID]), VOCABULARY)
    running = []
    for i, (prompt, limit, seed, options) in enumerate(requests):
        running.append(add(scheduler, prompt, Sampling.from_options(options), max_tokens=limit, seed=seed))
        if i == len(requests) // 2:
            for _ in range(late):
                scheduler.step()
    run(scheduler)
    assert not backend.histories, "room was not given back"
    for (prompt, limit, seed, options), sequence in zip(requests, running, strict=True):
        ids, text = alone(prompt, Sampling.from_options(options), limit, seed)
        completion = sequence.completion
        assert completion is not None
        assert (completion.token_ids, completion.text) == (ids, text)
        assert completion.usage.prompt_tokens == len(prompt)
        assert (completion.finish_reason == "length") == (completion.stop is None)


def test_long_prompts_enter_in_pieces_while_others_go_on() -> None:
    backend = HistoryBackend(4, 100_000)
    scheduler = Scheduler(backend, frozenset([STOP_ID]), VOCABULARY)
    chunks: list[Chunk] = []
    options = Sampling(temperature=0.0, ignore_eos=True)
    first = add(scheduler, [1], options, max_tokens=50, seed=0, on_chunk=chunks.append)
    scheduler.step()
    prompt = [i % VOCABULARY for i in range(5 * PREFILL_TOKENS + 7)]
    second = add(scheduler, prompt, options, max_tokens=3, seed=0)
    while not second.choices:
        scheduler.step()
    assert len(chunks) == 1 + 6, "the running answer waited for the long prompt"
    assert backend.largest_step <= PREFILL_TOKENS + 1
    run(scheduler)
    assert second.completion is not None and first.completion is not None
    assert second.completion.token_ids == alone(prompt, options, 3, 0)[0]


@pytest.mark.parametrize("max_sequences", [1, 2, 3, 8])
def test_followers_share_the_computed_prompt(max_sequences: int) -> None:
    backend = HistoryBackend(max_sequences, 10_000)
    scheduler = Scheduler(backend, frozenset([STOP_ID]), VOCABULARY)
    sampling, prompt = Sampling(temperature=1.0, ignore_eos=True), list(range(30))
    leader = add(scheduler, prompt, sampling, max_tokens=5, seed=0)
    group = [leader] + [add(scheduler, prompt, sampling, max_tokens=5, seed=s, leader=leader) for s in range(1, 5)]
    run(scheduler)
    for seed, sequence in enumerate(group):
        assert sequence.completion is not None
        assert sequence.completion.token_ids == alone(prompt, sampling, 5, seed)[0]
    if max_sequences >= 5:
        assert backend.computed == len(prompt) + 5 * 4, "the prompt was computed more than once"


def test_followers_join_beside_a_prompt_in_pieces() -> None:
    """A leader's logits serve its followers, and not the long prompt that is in the same step."""
    backend = HistoryBackend(8, 100_000)
    scheduler = Scheduler(backend, frozenset([STOP_ID]), VOCABULARY)
    sampling, prompt = Sampling(temperature=1.0, ignore_eos=True), [1, 2, 3]
    leader = add(scheduler, prompt, sampling, max_tokens=5, seed=0)
    long = [i % VOCABULARY for i in range(2 * PREFILL_TOKENS)]
    other = add(scheduler, long, sampling, max_tokens=5, seed=9)
    follower = add(scheduler, prompt, sampling, max_tokens=5, seed=1, leader=leader)
    run(scheduler)
    for sequence, ids, seed in ((leader, prompt, 0), (other, long, 9), (follower, prompt, 1)):
        assert sequence.completion is not None
        assert sequence.completion.token_ids == alone(ids, sampling, 5, seed)[0]


def test_cancel_anywhere_frees_the_room_and_keeps_the_others() -> None:
    sampling = Sampling(temperature=0.0, ignore_eos=True)
    for moment in range(8):
        backend = HistoryBackend(2, 1000)
        scheduler = Scheduler(backend, frozenset([STOP_ID]), VOCABULARY)
        kept = add(scheduler, [1, 2], sampling, max_tokens=12, seed=0)
        dropped = add(scheduler, [3], sampling, max_tokens=12, seed=0)
        waiting = add(scheduler, [4], sampling, max_tokens=4, seed=0)
        for _ in range(moment):
            scheduler.step()
        held = len(backend.histories)
        scheduler.cancel(dropped)
        assert len(backend.histories) == max(0, held - 1), "its room is not free at once"
        scheduler.cancel(dropped)
        completion = dropped.completion
        assert isinstance(completion, Completion) and completion.finish_reason == "cancelled"
        assert completion.token_ids == alone([3], sampling, 12, 0)[0][:moment]
        run(scheduler)
        assert not backend.histories
        for sequence, prompt, limit in ((kept, [1, 2], 12), (waiting, [4], 4)):
            assert sequence.completion is not None
            assert sequence.completion.token_ids == alone(prompt, sampling, limit, 0)[0]


def test_an_interrupted_step_ends_all_and_frees_the_room() -> None:
    backend = HistoryBackend(2, 1000)
    scheduler = Scheduler(backend, frozenset([STOP_ID]), VOCABULARY)
    sampling = Sampling(temperature=0.0, ignore_eos=True)
    sequences = [add(scheduler, [i], sampling, max_tokens=20, seed=0) for i in range(3)]
    backend.fail_at = 9
    with pytest.raises(KeyboardInterrupt):
        run(scheduler)
    assert scheduler.idle and not backend.histories
    assert all(isinstance(sequence.error, KeyboardInterrupt) for sequence in sequences)
    backend.fail_at = None
    again = add(scheduler, [1], sampling, max_tokens=5, seed=0)
    run(scheduler)
    assert again.completion is not None and again.completion.token_ids == alone([1], sampling, 5, 0)[0]


def test_ids_without_text_are_never_chosen() -> None:
    backend = HistoryBackend(1, 1000)
    scheduler = Scheduler(backend, frozenset(), 3)
    sequence = add(scheduler, [1], Sampling(temperature=5.0), max_tokens=100, seed=0)
    run(scheduler)
    assert sequence.completion is not None and set(sequence.completion.token_ids) == {0, 1, 2}
