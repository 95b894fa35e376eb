"""The paged cache against a plain model of memory: whatever happens, a sequence's pages hold exactly its tokens.

Memory is an array of (page, slot) into which tokens are written where a backend would write keys and values. What a
sequence reads back must be its own tokens; then no page is shared by sequences that differ in it, none is written
while somebody else holds it, and the prefix cache finds nothing that is not there. The rest is bookkeeping: no page is
lost, and a prompt starts from the longest beginning that is still remembered.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence, Sized

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from herd.engine.paged_cache import CachedSequence, PagedCache

SIZE = 4
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)  # two tokens only, so that many prompts begin alike


class Memory:
    """Pages of tokens behind a PagedCache."""

    def __init__(self, n_pages: int, size: int = SIZE) -> None:
        self.pages = [[-1] * size for _ in range(n_pages)]
        self.copies = 0
        self.cache = PagedCache(n_pages, size, self.copy_page)

    def copy_page(self, source: int, target: int) -> None:
        assert source != target
        self.pages[target] = list(self.pages[source])
        self.copies += 1

    def append(self, sequence: CachedSequence, tokens: Sequence[int]) -> bool:
        """What a backend does in a step: ask for room, write, count."""
        if not self.cache.grow(sequence, len(tokens)):
            return False
        self.write(sequence, tokens)
        return True

    def write(self, sequence: CachedSequence, tokens: Sequence[int]) -> None:
        size = self.cache.page_tokens
        for position, token in enumerate(tokens, len(sequence.tokens)):
            self.pages[sequence.pages[position // size]][position % size] = token
        self.cache.append(sequence, tokens)

    def read(self, sequence: CachedSequence) -> list[int]:
        held = [token for page in sequence.pages for token in self.pages[page]]
        return held[: len(sequence.tokens)]

    def begin(self, tokens: Sequence[int]) -> CachedSequence:
        """A sequence of all of `tokens`, from what is remembered of them on."""
        sequence = self.cache.open(tokens)
        assert self.append(sequence, tokens[len(sequence.tokens) :])
        return sequence


class CacheMachine(RuleBasedStateMachine):
    """Random lives of sequences. `live` has the tokens each must hold, `remembered` each full page that was kept."""

    @initialize(n_pages=st.sampled_from([2, 5, 9, 200]))
    def start(self, n_pages: int) -> None:
        self.memory = Memory(n_pages)
        self.cache = self.memory.cache
        self.live: list[tuple[CachedSequence, list[int]]] = []
        self.remembered: dict[tuple[int, ...], int] = {}  # beginning of whole pages -> page of its end
        self.texts: list[list[int]] = []
        self.gaps = False  # a page was forgotten before pages that follow it: those may not be found any more

    def some(self, data: st.DataObject) -> tuple[CachedSequence, list[int]]:
        return self.live[data.draw(st.integers(0, len(self.live) - 1))]

    @rule(data=st.data(), more=TOKENS)
    def open(self, data: st.DataObject, more: list[int]) -> None:
        """A prompt that goes on where an earlier text was, or a new one."""
        prompt = data.draw(st.sampled_from([[], *self.texts])) + more
        sequence = self.cache.open(prompt)
        n = len(sequence.tokens)
        ends = range(SIZE, len(prompt), SIZE)
        missing = [end for end in ends if tuple(prompt[:end]) not in self.remembered]
        expected = missing[0] - SIZE if missing else max(ends, default=0)
        assert sequence.tokens == prompt[:n] and len(sequence.pages) == n // SIZE
        assert n == expected or (self.gaps and n < expected)
        self.live.append((sequence, list(prompt[:n])))
        self.texts = [*self.texts, prompt][-20:]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tokens=TOKENS, n_kept=st.none() | st.integers(0, 14))
    def append(self, data: st.DataObject, tokens: list[int], n_kept: int | None) -> None:
        """One step: room, then the tokens, or no room and no change; then perhaps some of them are taken back."""
        sequence, expected = self.some(data)
        last = sequence.pages[len(expected) // SIZE :][:1]  # page that is written to next, if there already
        shared = sum(page in other.pages for page in last for other, _ in self.live) > 1
        needed = max(0, -(-(len(expected) + len(tokens)) // SIZE) - len(sequence.pages)) + shared
        room, held, copies = self.cache.available, set(sequence.pages), self.memory.copies
        before = self.state(sequence)
        if not self.cache.grow(sequence, len(tokens)):
            assert needed > room and self.state(sequence) == before and self.memory.copies == copies
            return
        assert needed <= room and self.cache.available == room - needed + (len(before[1].pages) - len(held))
        self.forget(set(sequence.pages) - held)
        self.memory.write(sequence, tokens)
        expected += tokens
        self.texts = [*self.texts, list(expected)][-20:]
        for end in range(SIZE, len(expected) + 1, SIZE):
            self.remembered.setdefault(tuple(expected[:end]), sequence.pages[end // SIZE - 1])
        if n_kept is not None and n_kept < len(tokens):
            del expected[len(expected) - len(tokens) + n_kept :]
            dropped = set(sequence.pages[len(expected) // SIZE :])
            self.cache.truncate(sequence, len(expected))
            self.forget(dropped)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        sequence, expected = self.some(data)
        room = self.cache.available
        self.live.append((self.cache.fork(sequence), list(expected)))
        assert self.cache.available == room, "a fork takes no room until it is written to"

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        found = self.some(data)
        self.cache.release(found[0])
        self.live = [entry for entry in self.live if entry is not found]

    @invariant()
    def sequences_hold_their_tokens(self) -> None:
        for sequence, expected in self.live:
            assert sequence.tokens == expected and self.memory.read(sequence) == expected

    @invariant()
    def no_page_is_lost(self) -> None:
        held = {page for sequence, _ in self.live for page in sequence.pages}
        assert self.cache.available + len(held) == self.cache.n_pages

    def teardown(self) -> None:
        for sequence, _ in self.live:
            self.cache.release(sequence)
        assert self.cache.available == self.cache.n_pages

    def state(self, sequence: CachedSequence) -> tuple[dict[str, object], CachedSequence]:
        everything = {name: value for name, value in vars(self.cache).items() if name != "_copy_page"}
        return copy.deepcopy((everything, sequence))

    def forget(self, pages: set[int]) -> None:
        """These pages are given out again or written to: what was remembered in them is not any more."""
        for key in [key for key, page in self.remembered.items() if page in pages]:
            del self.remembered[key]
            followers = [*self.remembered, *(tuple(expected) for _, expected in self.live)]
            self.gaps |= any(follower[: len(key)] == key for follower in followers)


CacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPagedCache = CacheMachine.TestCase


def test_all_but_the_last_token_may_be_reused() -> None:
    """The last token is always computed, since somebody wants the logits after it."""
    memory = Memory(20)
    memory.cache.release(memory.begin(list(range(100, 117))))
    for n, reused in ((3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (16, 12), (17, 16), (18, 16)):
        found = memory.cache.open([*range(100, 100 + n)])
        assert len(found.tokens) == reused
        memory.cache.release(found)
    other = memory.cache.open([100, 101, 102, 103, 99, 105, 106, 107, 108])
    assert len(other.tokens) == 4


def test_the_page_that_was_let_go_first_is_forgotten_first() -> None:
    """Of one sequence, the end goes before the beginning; a use makes a page young again; held pages stay."""
    memory = Memory(6)
    first, second = [1] * 8 + [2], [3] * 8 + [4]
    for prompt in (first, second, first):  # the first is used again after the second
        memory.cache.release(memory.begin(prompt))
    assert memory.cache.available == 6
    found = []
    for i in range(6):
        assert memory.append(CachedSequence(), [10 + i])  # takes a page and holds it
        seen = copy.deepcopy(memory).cache  # looking is a use
        found.append(tuple(len(seen.open(prompt).tokens) for prompt in (first, second)))
    assert found == [(8, 8), (8, 8), (8, 4), (8, 0), (4, 0), (0, 0)]
    assert not memory.append(CachedSequence(), [16])


def test_a_fork_copies_only_the_page_it_writes_to() -> None:
    memory = Memory(20)
    leader = memory.begin([5] * 10)
    followers = [memory.cache.fork(leader) for _ in range(3)]
    assert memory.cache.available == 17 and memory.copies == 0
    for token, sequence in enumerate([leader, *followers]):
        assert memory.append(sequence, [token])
    assert memory.copies == 3, "the last holder writes in place"
    assert [memory.read(sequence)[-1] for sequence in [leader, *followers]] == [0, 1, 2, 3]
    assert memory.cache.available == 14


def test_a_fork_between_room_and_writing() -> None:
    """Room that was asked for and not yet used is not shared by a fork."""
    memory = Memory(20)
    leader = memory.begin([5, 5])
    assert memory.cache.grow(leader, 6)
    follower = memory.cache.fork(leader)
    assert memory.append(leader, [1] * 6) and memory.append(follower, [2] * 6)
    assert memory.read(leader) == [5, 5, *[1] * 6]
    assert memory.read(follower) == [5, 5, *[2] * 6]


def test_a_long_prompt_is_found_in_a_crowd_of_others() -> None:
    """Two thousand prompts with a common beginning through a cache of few pages: the common pages stay."""
    memory = Memory(12)
    system = [7] * 16
    memory.cache.release(memory.begin([*system, 0]))
    for i in range(2000):
        sequence = memory.cache.open([*system, *[i] * 12])
        assert len(sequence.tokens) == 16
        assert memory.append(sequence, [i] * 12)
        memory.cache.release(sequence)
        assert memory.cache.available == 12
    kept = sum(len(value) for value in vars(memory.cache).values() if isinstance(value, Sized))
    assert kept <= 8 * 12, "what is kept about pages grows with use"
