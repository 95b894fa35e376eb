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
from herd.engine.live_sequence import LiveSequence
from herd.engine.request import Chunk, Completion, Sampling
from herd.engine.sampler import SamplerRow, sample
from herd.engine.scheduler import PREFILL_TOKENS, Scheduler
from herd.engine.speculation import MAX_DRAFT, Ask

VOCABULARY = 40
STOP_ID = 39


def history_logits(history: Sequence[int]) -> np.ndarray:
    digest = hashlib.blake2b(np.asarray(history, np.int64).tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).normal(0, 2, VOCABULARY).astype(np.float32)


class HistoryBackend:
    """Logits from the hash of all tokens so far; `reserve` takes room for a whole sequence at once.

    It remembers the beginnings of finished sequences in pages of `remembers` tokens, as a prefix cache does (0: none).
    """

    config = None
    context = 1 << 20

    def __init__(self, max_sequences: int, max_tokens: int, remembers: int = 0) -> None:
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.remembers = remembers
        self.histories: dict[int, list[int]] = {}
        self.capacities: dict[int, int] = {}
        self.known: set[tuple[int, ...]] = set()
        self.computed = 0
        self.largest_step = 0
        self.fail_at: int | None = None
        self._next = 0

    def reserve(
        self, capacity: int, prompt: Sequence[int] = (), adapter: str | None = None, salt: str = ""
    ) -> tuple[int, int] | None:
        if self.histories and not self.admits(capacity, len(prompt)):
            return None
        n_reused = 0
        while self.remembers and n_reused + self.remembers < len(prompt):
            if tuple(prompt[: n_reused + self.remembers]) not in self.known:
                break
            n_reused += self.remembers
        return self._open(list(prompt[:n_reused]), capacity), n_reused

    def admits(self, capacity: int, n_prompt: int) -> bool:
        return len(self.histories) < self.max_sequences and sum(self.capacities.values()) + capacity <= self.max_tokens

    def fork(self, sequence: int, capacity: int) -> int | None:
        history = self.histories[sequence]
        return self._open(list(history), capacity) if self.admits(capacity, len(history)) else None

    def grow(self, sequence: int, n_tokens: int) -> bool:
        assert len(self.histories[sequence]) + n_tokens <= self.capacities[sequence]
        return True

    def truncate(self, sequence: int, length: int) -> None:
        assert 0 < length <= len(self.histories[sequence])
        del self.histories[sequence][length:]

    def release(self, sequence: int) -> None:
        history = self.histories.pop(sequence)
        del self.capacities[sequence]
        if self.remembers:
            self.known |= {tuple(history[:end]) for end in range(self.remembers, len(history) + 1, self.remembers)}

    def step(self, spans: Sequence[Span]) -> np.ndarray:
        assert len({span.sequence for span in spans}) == len(spans)
        self.largest_step = max(self.largest_step, sum(len(span.tokens) for span in spans))
        rows = []
        for span in spans:
            assert 0 <= span.outputs <= len(span.tokens) and len(span.tokens) > 0
            history = self.histories[span.sequence]
            history += span.tokens
            rows += [history_logits(history[: len(history) - i]) for i in reversed(range(span.outputs))]
            self.computed += len(span.tokens)
            assert len(history) <= self.capacities[span.sequence]
        if self.fail_at is not None and self.computed >= self.fail_at:
            raise KeyboardInterrupt
        return np.stack(rows) if rows else np.empty((0, VOCABULARY), np.float32)

    def _open(self, history: list[int], capacity: int) -> int:
        self._next += 1
        self.histories[self._next] = history
        self.capacities[self._next] = capacity
        return self._next


class GrowingBackend(HistoryBackend):
    """Gives room only as sequences grow, and so runs out of it in the middle: sequences must be taken back.

    As every backend, it always has room for a sequence that is alone.
    """

    def __init__(self, max_sequences: int, max_tokens: int, remembers: int = 0) -> None:
        super().__init__(max_sequences, max_tokens, remembers)
        self.granted: dict[int, int] = {}
        self.refused = 0

    def admits(self, capacity: int, n_prompt: int) -> bool:
        held = sum(self.granted.values())
        return len(self.histories) < self.max_sequences and held + n_prompt + 1 <= self.max_tokens

    def grow(self, sequence: int, n_tokens: int) -> bool:
        super().grow(sequence, n_tokens)
        needed = max(self.granted.get(sequence, 0), len(self.histories[sequence]) + n_tokens)
        others = sum(held for other, held in self.granted.items() if other != sequence)
        if len(self.histories) > 1 and others + needed > self.max_tokens:
            self.refused += 1
            return False
        self.granted[sequence] = needed
        return True

    def fork(self, sequence: int, capacity: int) -> int | None:
        copy = super().fork(sequence, capacity)
        if copy is not None:
            self.granted[copy] = len(self.histories[copy])
        return copy

    def release(self, sequence: int) -> None:
        super().release(sequence)
        self.granted.pop(sequence, None)

    def step(self, spans: Sequence[Span]) -> np.ndarray:
        for span in spans:
            assert len(self.histories[span.sequence]) + len(span.tokens) <= self.granted[span.sequence], "no room asked"
        return super().step(spans)


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


@pytest.mark.parametrize("kind", [HistoryBackend, GrowingBackend])
@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=12),
    max_sequences=st.integers(1, 8),
    max_tokens=st.integers(10, 400),
    remembers=st.sampled_from([0, 4]),
    late=st.integers(0, 20),
)
def test_every_crowd_gives_what_a_plain_loop_gives(
    kind: type[HistoryBackend], requests: list, max_sequences: int, max_tokens: int, remembers: int, late: int
) -> None:
    backend = kind(max_sequences, max_tokens, remembers)
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


class Prophet:
    """Guesses what will come, since it knows all texts to their end; every n-th guess is wrong (`errors`; 0: none)."""

    def __init__(self, texts: list[list[int]], errors: int) -> None:
        self.texts = texts
        self.errors = errors
        self.guessed = 0
        self.known: set[int] = set()

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        guesses = []
        for ask in asks:
            self.known.add(ask.key)
            done = len(ask.tokens)
            whole = next(text for text in self.texts if text[:done] == list(ask.tokens))
            guesses.append([self.guess(token) for token in whole[done : done + ask.n]])
        return guesses

    def guess(self, token: int) -> int:
        self.guessed += 1
        return (token + 1) % VOCABULARY if self.errors and self.guessed % self.errors == 0 else token

    def forget(self, key: int) -> None:
        self.known.discard(key)

    def close(self) -> None: ...


@pytest.mark.parametrize("kind", [HistoryBackend, GrowingBackend])
@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=8),
    max_tokens=st.integers(30, 300),
    remembers=st.sampled_from([0, 4]),
    errors=st.sampled_from([0, 1, 2, 5]),
)
def test_guesses_change_nothing(
    kind: type[HistoryBackend], requests: list, max_tokens: int, remembers: int, errors: int
) -> None:
    """Right ones, wrong ones and both; with stops in the middle, and with room that runs out."""
    expected = [alone(prompt, Sampling.from_options(options), limit, seed) for prompt, limit, seed, options in requests]
    texts = [[*prompt, *ids] for (prompt, *_), (ids, _) in zip(requests, expected, strict=True)]
    backend, prophet = kind(5, max_tokens, remembers), Prophet(texts, errors)
    scheduler = Scheduler(backend, frozenset([STOP_ID]), VOCABULARY, prophet)
    running = [
        add(scheduler, prompt, Sampling.from_options(options), max_tokens=limit, seed=seed)
        for prompt, limit, seed, options in requests
    ]
    run(scheduler)
    assert not backend.histories and not prophet.known
    for (ids, text), sequence in zip(expected, running, strict=True):
        assert sequence.completion is not None
        assert (sequence.completion.token_ids, sequence.completion.text) == (ids, text)
        timings = sequence.completion.timings
        assert 0 <= timings.accepted_tokens <= timings.drafted_tokens and timings.accepted_tokens < len(ids)
        if errors == 1:
            assert timings.accepted_tokens == 0


def test_right_guesses_save_steps() -> None:
    sampling, prompt = Sampling(temperature=1.0, ignore_eos=True), [1, 2, 3]
    ids = alone(prompt, sampling, 60, 0)[0]
    backend = HistoryBackend(1, 1000)
    scheduler = Scheduler(backend, frozenset([STOP_ID]), VOCABULARY, Prophet([prompt + ids], errors=0))
    sequence = add(scheduler, prompt, sampling, max_tokens=60, seed=0)
    steps = 0
    while not scheduler.idle:
        scheduler.step()
        steps += 1
    assert sequence.completion is not None and sequence.completion.token_ids == ids
    assert steps <= 2 + 60 / (1 + MAX_DRAFT) + MAX_DRAFT, "the number of guesses grows by one a step at least"
    assert backend.computed == len(prompt) + 59, "a right guess is computed once"


def test_when_room_runs_out_the_youngest_gives_way() -> None:
    """The oldest is never interrupted; those that had to give way come back and lose nothing."""
    backend = GrowingBackend(max_sequences=4, max_tokens=60)
    scheduler = Scheduler(backend, frozenset([STOP_ID]), VOCABULARY)
    sampling = Sampling(temperature=1.0, ignore_eos=True)
    chunks: list[list[Chunk]] = [[], [], []]
    group = [add(scheduler, [i] * 10, sampling, max_tokens=30, seed=i, on_chunk=chunks[i].append) for i in range(3)]
    steps = 0
    while group[0].completion is None:
        scheduler.step()
        steps += 1
    assert steps == 30 and backend.refused > 0
    run(scheduler)
    for i, sequence in enumerate(group):
        assert sequence.completion is not None
        assert sequence.completion.token_ids == alone([i] * 10, sampling, 30, i)[0]
        assert [chunk.token_id for chunk in chunks[i]] == sequence.completion.token_ids, "a token was said twice"


def test_what_a_backend_remembers_is_not_computed_again() -> None:
    backend = HistoryBackend(4, 10_000, remembers=4)
    scheduler = Scheduler(backend, frozenset([STOP_ID]), VOCABULARY)
    sampling, prompt = Sampling(temperature=0.0, ignore_eos=True), list(range(22))
    for computed in (22 + 4, 2 + 4):  # of 22 tokens five pages of four are remembered the second time
        backend.computed = 0
        sequence = add(scheduler, prompt, sampling, max_tokens=5, seed=0)
        run(scheduler)
        assert sequence.completion is not None
        assert sequence.completion.token_ids == alone(prompt, sampling, 5, 0)[0]
        assert backend.computed == computed


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
