"""Who shares the batch with grammars that are being compiled: nobody waits for another's, and no error spreads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from herd import LLM
from herd.engine import Grammar, Sampling
from herd.engine import grammar_trial as trials
from herd.engine.constraint import GrammarFailed
from herd.engine.live_sequence import LiveSequence
from herd.engine.scheduler import _COMPILED_AHEAD

pytest.importorskip("llguidance")

WORD, DIGITS = Grammar.regex("[a-f]{5}"), Grammar.regex("[0-9]{5}")


class Panic(BaseException):
    """What a compiled library's panic is in Python: no Exception."""


class Compiler:
    """Compiles for answers only as often as it is let to, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sources: list[str] = []
        self.error: BaseException | None = None
        self._may = threading.Semaphore(0)
        self._matcher = trials._matcher
        monkeypatch.setattr(trials, "_matcher", self.matcher)

    def matcher(self, tokenizer: Any, source: str) -> Any:
        self.sources.append(source)
        assert self._may.acquire(timeout=20)
        error, self.error = self.error, None
        if error is not None:
            raise error
        return self._matcher(tokenizer, source)

    def let(self, times: int = 1000) -> None:
        self._may.release(times)


@pytest.fixture
def compiler(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    for grammar in (WORD, DIGITS):
        llm.generate("x", grammar=grammar, max_tokens=1)  # known from here on
    compiler = Compiler(monkeypatch)
    yield compiler
    compiler.let()


def begin(llm: LLM, grammar: Grammar | None = WORD, n: int = 1, **options: Any) -> list[LiveSequence]:
    sampling = Sampling(**{"grammar": grammar, "max_tokens": 20, "seed": 3, **options})
    return llm.begin(llm._encode("some prompt of more than one token"), sampling, n=n)


def finish(llm: LLM, sequences: list[LiveSequence]) -> list[list[int]]:
    end = time.monotonic() + 20
    while not all(sequence.completion for sequence in sequences):
        assert time.monotonic() < end
        llm.step()
    return [sequence.completion.token_ids for sequence in sequences if sequence.completion]


def steps_until(llm: LLM, condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        llm.step()


def test_later_requests_go_past_a_grammar(llm: LLM, compiler: Compiler) -> None:
    bound = begin(llm, n=5)
    assert llm.scheduler.waiting == 0 and llm.scheduler.preparing == 1
    later = begin(llm, None, n=2)
    assert llm.scheduler.waiting == 2
    finish(llm, later)
    assert not any(sequence.choices or sequence.started for sequence in bound)
    assert llm.scheduler.waiting == 0 and llm.scheduler.preparing == 1
    llm.cancel(bound)
    assert llm.scheduler.idle and llm.scheduler.waiting == llm.scheduler.preparing == 0


@pytest.mark.parametrize("options", [{}, {"prompt_logprobs": True, "logprobs": True}])
def test_answers_of_one_request_begin_as_each_is_ready(
    llm: LLM, backend: str, compiler: Compiler, options: dict[str, Any]
) -> None:
    """They are those that come of answers which begin together."""
    compiler.let(4)
    together = begin(llm, n=4, **options)
    expected = finish(llm, together)
    late = begin(llm, n=4, **options)
    for i, sequence in enumerate(late):
        compiler.let(1)
        assert finish(llm, [sequence]) == [expected[i]]
        assert not any(other.started for other in late[i + 1 :])
    for one, other in zip(together, late, strict=True):
        assert one.completion is not None and other.completion is not None
        assert one.completion.prompt_logprobs == other.completion.prompt_logprobs
        expected_logprobs = one.completion.logprobs
        if backend == "torch":  # its rounding depends on how many tokens a step has
            expected_logprobs = pytest.approx(expected_logprobs, abs=1e-4)
        assert other.completion.logprobs == expected_logprobs


def test_a_step_waits_for_no_grammar_for_long(llm: LLM, compiler: Compiler) -> None:
    bound = begin(llm)
    began = time.monotonic()
    for _ in range(5):
        llm.step()
    assert 0.05 < time.monotonic() - began < 2  # and does not spin
    llm.cancel(bound)


def test_first_answers_come_before_further_ones(llm: LLM, compiler: Compiler) -> None:
    many = begin(llm, WORD, n=5)
    llm.step()
    one = begin(llm, DIGITS)
    llm.step()
    compiler.let(2)
    finish(llm, [many[0], *one])
    assert ["[0-9]" in source for source in compiler.sources[:2]] == [False, True]
    assert not any(sequence.choices for sequence in many[1:])
    compiler.let()
    finish(llm, many)


def test_grammars_are_compiled_a_bounded_number_ahead(llm: LLM, compiler: Compiler) -> None:
    bound = begin(llm, n=_COMPILED_AHEAD + 30, max_tokens=1)
    llm.step()
    coming = [s.row.constraint is not None and s.row.constraint._coming is not None for s in bound]
    assert coming == [True] * _COMPILED_AHEAD + [False] * 30
    compiler.let()
    assert len(finish(llm, bound)) == len(bound)


@pytest.mark.parametrize("error", [Panic("unreachable"), MemoryError(), KeyboardInterrupt()])
def test_what_goes_wrong_while_compiling_ends_that_answer_alone(
    llm: LLM, compiler: Compiler, error: BaseException
) -> None:
    compiler.let(1)
    (expected,) = finish(llm, begin(llm, DIGITS))
    free = begin(llm, None, ignore_eos=True, max_tokens=60)
    llm.step()
    compiler.error = error
    (caught,) = begin(llm)
    fine = begin(llm, DIGITS)
    compiler.let(2)
    steps_until(llm, lambda: caught.error is not None)
    assert isinstance(caught.error, GrammarFailed) and "compiling it failed" in str(caught.error)
    assert finish(llm, fine) == [expected]
    assert len(finish(llm, free)[0]) == 60


def test_a_thread_that_does_not_start_ends_one_answer(
    llm: LLM, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(work: Any) -> None:
        raise RuntimeError("can't start new thread")

    compiler.let()
    with monkeypatch.context() as patch:
        patch.setattr(trials, "_deep", refused)
        (caught,) = begin(llm)
        steps_until(llm, lambda: caught.error is not None)
    assert isinstance(caught.error, GrammarFailed) and "start new thread" in str(caught.error)
    assert len(finish(llm, begin(llm, n=2))) == 2  # nothing of it is left to be compiled
    assert len(compiler.sources) == 2


def test_after_an_error_of_the_batch_nothing_of_it_is_compiled(
    llm: LLM, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(spans: Any) -> Any:
        raise OSError("broken")

    bound = begin(llm, n=6)
    llm.step()
    begin(llm, None)
    with monkeypatch.context() as patch:
        patch.setattr(llm.backend, "step", broken)
        with pytest.raises(OSError, match="broken"):
            llm.step()
    assert all(isinstance(sequence.error, OSError) for sequence in bound) and llm.scheduler.idle
    assert llm.scheduler.waiting == llm.scheduler.preparing == 0
    compiler.let()
    finish(llm, begin(llm, DIGITS))
    assert len(compiler.sources) == 2  # what had begun, and the last one
