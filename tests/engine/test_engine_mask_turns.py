"""Masks of grammars that take long: other answers go on beside them, and no token of anybody is another one for it."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from herd import LLM
from herd.engine import Grammar, Sampling, mask_turns
from herd.engine.constraint import BEYOND_S, Constraint, GrammarFailed
from herd.engine.live_sequence import LiveSequence
from herd.engine.mask_turns import STEP_S, MaskTurns

pytest.importorskip("llguidance")

AMBIGUOUS = Grammar.lark("start: s\ns: s s | /[a-z]/")
WORDS = Grammar.regex("([a-f]{1,5} ){8}")


class Costly:
    """A constraint whose masks take so many seconds, as the turns see it."""

    def __init__(self, seconds: float) -> None:
        self.mask_s, self.sat_out, self.ready, self._unpaid = seconds, 0, False, 0.0

    def allowed(self) -> None:
        self.ready, self._unpaid = True, self.mask_s

    def take_unpaid(self) -> float:
        unpaid, self._unpaid = self._unpaid, 0.0
        return unpaid


def late(turns: MaskTurns, asking: Sequence[Costly]) -> list[Costly]:
    return cast("list[Costly]", turns.late(cast("list[Constraint]", asking)))


def step(turns: MaskTurns, asking: Sequence[Costly], *, alone: bool = False) -> list[Costly]:
    """One step of those who have chosen their tokens where they could; those that sit out."""
    turns.begin(alone=alone)
    found = late(turns, asking)
    for each in asking:
        each.ready = each.ready and each in found
    return found


def test_cheap_masks_come_first_and_nobody_sits_out_for_ever() -> None:
    turns, cheap, dear = MaskTurns(), Costly(0.0001), [Costly(3 * STEP_S) for _ in range(5)]
    sat_out = [step(turns, [*dear, cheap]) for _ in range(30)]
    assert sum(cheap in each for each in sat_out) == 20  # a dear one a step is paid by the two after it
    assert all(sum(each not in late for late in sat_out) == 2 for each in dear)
    assert max(each.sat_out for each in dear) < 30


def test_who_is_alone_waits_for_nothing() -> None:
    turns, dear = MaskTurns(), Costly(10 * STEP_S)
    assert not any(step(turns, [dear], alone=True) for _ in range(5))
    assert step(turns, [dear]) == [dear]  # what it took alone is forgotten, but for the last one
    assert not step(turns, [dear], alone=True)


def test_tokens_are_paid_for_too() -> None:
    turns, one, other = MaskTurns(), Costly(0.0), Costly(0.0)
    one._unpaid = 2 * STEP_S  # as its last token was chosen
    assert step(turns, [one, other]) == [one, other]


def begin(
    llm: LLM, n: int = 1, prompt: str = "some prompt of more than one token", **options: Any
) -> list[LiveSequence]:
    return llm.begin(llm._encode(prompt), Sampling(**{"max_tokens": 30, "seed": 3, **options}), n=n)


def ids(sequences: Sequence[LiveSequence]) -> list[list[int]]:
    assert all(s.completion is not None for s in sequences), [s.error for s in sequences]
    return [s.completion.token_ids for s in sequences if s.completion is not None]


@pytest.mark.parametrize("options", [{}, {"prompt_logprobs": True, "logprobs": True}])
def test_who_sits_out_gets_the_same_tokens(llm: LLM, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """With next to no time for masks, answers with a grammar wait as long as others go on, and then for each other."""

    def answers() -> list[LiveSequence]:
        found = begin(llm, 3, grammar=WORDS, **options) + begin(llm, grammar=WORDS, seed=9, prompt="x", **options)
        free = begin(llm, seed=4, max_tokens=25, ignore_eos=True, prompt="y", **options)
        held = 0
        while not all(s.completion for s in [*found, *free]):
            llm.step()
            held = max(held, sum(s.held_V is not None for s in found))
        assert all(s.held_V is None for s in found)
        most.append(held)
        return found + free

    most: list[int] = []
    expected = answers()
    monkeypatch.setattr(mask_turns, "STEP_S", 1e-9)
    late = answers()
    assert ids(late) == ids(expected)
    assert most[1] > 0
    tolerance = 0.0 if llm.backend.identity.startswith("native") else 1e-4  # torch's bits depend on the batch
    for one, other in zip(late, expected, strict=True):
        assert one.completion is not None and other.completion is not None
        for name in ("logprobs", "prompt_logprobs"):
            found, wanted = getattr(one.completion, name), getattr(other.completion, name)
            assert found == (wanted and pytest.approx(wanted, rel=0, abs=tolerance))


def test_guesses_are_given_up_where_masks_are_late(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which ones are is drawn, so that it is now the first token of a step, now one after a guess that was right."""
    pytest.importorskip("herd._native")
    repeated, rng, given_up = Grammar.regex("(ab ab ){20}"), random.Random(0), 0

    def answers() -> list[LiveSequence]:
        found = begin(llm, 2, grammar=repeated, max_tokens=60) + begin(llm, max_tokens=20, ignore_eos=True)
        while not all(s.completion for s in found):
            llm.step()
        assert sum(s.n_accepted for s in found) > 0 and llm.scheduler.idle
        return found

    def drawn(_: MaskTurns, asking: Sequence[Constraint]) -> list[Constraint]:
        return [constraint for constraint in asking if rng.random() < 0.4]

    with LLM(tiny, kv="f32", backend="native", draft="ngram") as llm:
        expected = answers()
        monkeypatch.setattr(MaskTurns, "late", drawn)
        for _ in range(3):
            late = answers()
            assert ids(late) == ids(expected)
            given_up += sum(s.n_drafted - s.n_accepted for s in late)
        assert given_up > 3 * sum(s.n_drafted - s.n_accepted for s in expected)


def test_who_gives_up_its_place_while_it_sits_out_goes_on_later(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate("x", grammar=WORDS, max_tokens=30, seed=3)
    monkeypatch.setattr(mask_turns, "STEP_S", 1e-9)
    (bound,), (free,) = begin(llm, grammar=WORDS, prompt="x"), begin(llm, max_tokens=20, ignore_eos=True)
    while bound.held_V is None:
        llm.step()
    llm.scheduler.make_way()
    assert bound.held_V is None and bound.n_computed == 0
    while not (bound.completion and free.completion):
        llm.step()
    assert ids([bound]) == [expected.token_ids]


def test_a_grammar_of_many_readings_leaves_others_their_time(llm: LLM) -> None:
    """Its masks take longer with every token, up to 40 ms and more, in each of sixteen answers."""
    no_end = {i: -100.0 for i in llm.tokenizer.stop_ids}
    llm.max_tokens([1], Sampling(grammar=AMBIGUOUS))  # known from here on

    def worst_of_ten() -> float:
        (free,) = begin(llm, max_tokens=60, ignore_eos=True)
        times = []
        while free.completion is None:
            began = time.thread_time()
            llm.step()
            times.append(time.thread_time() - began)
        return max(sum(times[i : i + 10]) for i in range(len(times) - 10))

    alone = worst_of_ten()
    bound = [
        s for seed in range(16) for s in begin(llm, grammar=AMBIGUOUS, max_tokens=100, seed=seed, logit_bias=no_end)
    ]
    while not all(s.prepared for s in bound):
        llm.step()
    beside = worst_of_ten()
    llm.cancel(bound)
    assert beside < alone + 10 * STEP_S + 0.5, (alone, beside)  # seconds, if all had their masks at once


def test_what_masks_may_take_is_for_all_answers_of_a_request(llm: LLM) -> None:
    together, other = begin(llm, 3, grammar=WORDS), begin(llm, grammar=WORDS)
    while not all(s.choices for s in [*together, *other]):
        llm.step()
    assert together[1].row.constraint is not None
    together[1].row.constraint._spent.beyond = 2 * BEYOND_S
    while not all(s.error for s in together):
        assert not any(s.completion for s in together)
        llm.step()
    assert all(isinstance(s.error, GrammarFailed) for s in together)
    while other[0].completion is None:
        llm.step()
