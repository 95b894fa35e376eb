"""What was computed of a prompt is found again by who has the same salt, and by nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("herd._native")

from herd import LLM
from herd.engine import Sampling
from herd.engine.live_sequence import LiveSequence
from herd.engine.paged_cache import CachedSequence, PagedCache

PROMPT = list(range(40))


def written(cache: PagedCache, salt: str, tokens: list[int]) -> CachedSequence:
    sequence = cache.open(tokens, salt=salt)
    rest = tokens[len(sequence.tokens) :]
    assert cache.grow(sequence, len(rest))
    cache.append(sequence, rest)
    return sequence


def test_pages_are_found_by_their_salt() -> None:
    cache = PagedCache(32, 16, lambda source, target: None)
    mine = written(cache, "alice", PROMPT)
    assert cache.open(PROMPT, salt="alice").tokens == PROMPT[:32]
    for salt in ("bob", "", "alic"):
        assert cache.open(PROMPT, salt=salt).tokens == []
    assert cache.open(PROMPT, 0, "alice").tokens == []  # an adapter's are others in any case
    other = written(cache, "bob", PROMPT)
    assert not set(mine.pages) & set(other.pages)
    fork = cache.fork(mine)
    assert fork.salt == "alice" and cache.grow(fork, 20)
    cache.append(fork, list(range(20)))
    longer = [*PROMPT, *range(20)]
    assert cache.open(longer, salt="alice").tokens == longer[:48]
    assert cache.open(longer, salt="bob").tokens == longer[:32]


def test_answers_are_the_same_with_and_without(tiny: Path) -> None:
    def answer(salt: str) -> LiveSequence:
        (found,) = llm.begin(ids, Sampling(max_tokens=12, seed=1), salt=salt)
        while found.completion is None:
            llm.step()
        return found

    with LLM(tiny, backend="native", page_tokens=16) as llm:
        ids = llm._encode("a prompt that has some more tokens than a page of the cache has room for")
        found = [answer(salt) for salt in ("alice", "bob", "alice", "", "")]
        assert [s.n_reused > 0 for s in found] == [False, False, True, False, True]
        assert len({tuple(s.completion.token_ids) for s in found if s.completion}) == 1
