"""The native engine at its limits: wrong ids, full contexts, a full cache, broken weights, cancelled work.

Whatever happens, it says what was wrong, frees what it held, and answers the next request as if nothing had been.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from herd import LLM, ContextLengthExceeded, HerdError, UsageError, checkpoint, tokenizer
from herd.checkpoint import open_checkpoint
from herd.engine.backend import BackendOptions, Span
from herd.engine.memory import MemoryPlan

pytest.importorskip("herd._native")

from herd.engine import native_backend
from tests.engine.native_model import GREEDY, answer, backend_of, free_pages, native

CONTEXT = 192


def test_ids_that_are_no_tokens(tiny: Path) -> None:
    """The face refuses them; so does the compiled part, which would read beyond its memory."""
    with native(tiny) as llm:
        size = llm.config.vocab_size
        for wrong in ([size], [-1], [5, 2**31], [5, 2**63]):
            with pytest.raises(UsageError, match="no such token"):
                llm.generate(wrong)
            with pytest.raises(UsageError, match="no such token"):
                llm.score([5, *wrong])
        backend = backend_of(llm)
        reserved = backend.reserve(10)
        assert reserved is not None
        for id_ in (-1, size):
            with pytest.raises(ValueError, match="no such token"):
                backend.step([Span(reserved[0], [5, id_])])
        backend.release(reserved[0])
        assert answer(llm, [0, size - 1])[0]


@pytest.mark.parametrize("ctx", [1, 2, 63, 64, 65, CONTEXT])
def test_a_context_is_filled_to_the_last_token(tiny: Path, ctx: int) -> None:
    with native(tiny, ctx=ctx, kv="f32") as llm, native(tiny, kv="f32") as whole:
        text = [5 + i * 7 % 500 for i in range(CONTEXT)]
        assert len(llm.score(text[:ctx]).logprobs) == ctx - 1
        assert llm.score(text[:ctx]).logprobs == whole.score(text[:ctx]).logprobs
        for prompt in {max(1, ctx - 1), max(1, ctx // 2)}:
            if prompt < ctx:
                found = answer(llm, text[:prompt], max_tokens=ctx - prompt)
                assert len(found[0]) == ctx - prompt
                assert found == answer(whole, text[:prompt], max_tokens=ctx - prompt)
        with pytest.raises(ContextLengthExceeded):
            llm.generate(text[:ctx], max_tokens=1)
        with pytest.raises(ContextLengthExceeded):
            llm.score([*text, 5][: ctx + 1])
        assert free_pages(llm) == backend_of(llm)._pages.n_pages


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for the pages of one context and no more."""
    plan = native_backend.plan_native

    def exact(*args: Any, **options: Any) -> MemoryPlan:
        made = plan(*args, **options)
        return dataclasses.replace(made, free=made.needed)

    monkeypatch.setattr(native_backend, "plan_native", exact)


@pytest.mark.usefixtures("cramped")
def test_the_cache_is_the_limit_of_a_backend(tiny: Path) -> None:
    """A step beyond the last page is refused; the sequence is as it was, and others can have its pages."""
    backend = native_backend.open_backend(BackendOptions(path=tiny, quant=None, ctx=64, threads=1, kv="f32"))
    assert backend._pages.n_pages == 1
    reserved = backend.reserve(64)
    assert reserved is not None
    first = backend.step([Span(reserved[0], [5, 6, 7])])
    with pytest.raises(ContextLengthExceeded, match=r"65.*64"):
        backend.step([Span(reserved[0], [5] * 62)])
    assert backend.reserve(64, [5]) is None and not backend.grow(reserved[0], 62) and backend.grow(reserved[0], 61)
    backend.step([Span(reserved[0], [5] * 61)])
    backend.release(reserved[0])
    again = backend.reserve(64)
    assert again is not None
    np.testing.assert_array_equal(backend.step([Span(again[0], [5, 6, 7])]), first)
    backend.close()


def broken(path: Path, folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """The model of `path` with other weights."""
    with open_checkpoint(path) as stored:
        tensors = {name: np.array(stored[name]) for name in stored}
        config = stored.config
    change(tensors)
    made = folder / "broken"
    checkpoint.save(made, config, tensors, format="hf", dtype="f32", tokenizer=tokenizer.load(path))
    return made


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["embed.weight", "layers.1.attention.wk.weight", "layers.0.ffn.w2.weight",
                                  "norm.weight", "output.weight"])  # fmt: skip
def test_weights_that_are_no_numbers(tiny: Path, tmp_path: Path, name: str, value: float) -> None:
    """An error that says so, each time; with greedy choice and with drawing, in a stream and in a crowd."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].reshape(-1)[:: 7 if name == "embed.weight" else 11] = value

    with native(broken(tiny, tmp_path, change)) as llm:
        for options in (GREEDY, {"temperature": 1.0}):
            with pytest.raises(HerdError, match="not numbers"):
                llm.generate(["def ", "x", "import os"], **options)
        with pytest.raises(HerdError, match="not numbers"):
            list(llm.stream("def "))
        assert free_pages(llm) == backend_of(llm)._pages.n_pages and llm._scheduler.idle


@pytest.mark.parametrize("kv", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_broken_token_harms_only_those_who_use_it(tiny: Path, tmp_path: Path, kv: str, value: float) -> None:
    """A page of the cache that held what is no number serves the next sequence as a fresh one does."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["embed.weight"][77] = value

    path = broken(tiny, tmp_path, change)
    with native(path, kv=kv) as llm:
        before = answer(llm, [5, 6, 8])
    with native(path, kv=kv) as llm:
        for _ in range(3):
            with pytest.raises(HerdError, match="not numbers"):
                llm.generate([77] * 30, **GREEDY)
            assert answer(llm, [5, 6, 8]) == before


@pytest.mark.parametrize("kv", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_stood_before_a_broken_token_is_as_good_as_ever(tiny: Path, tmp_path: Path, kv: str, value: float) -> None:
    """Rows of a page that is remembered were computed together with one that is no number."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["embed.weight"][77] = value

    path, page = broken(tiny, tmp_path, change), [5 + i % 60 for i in range(64)]
    with native(path, kv=kv) as llm:
        before = answer(llm, [*page, 5])
    with native(path, kv=kv) as llm:
        with pytest.raises(HerdError, match="not numbers"):
            llm.generate([*page, 77], **GREEDY)
        again = llm.generate([*page, 5], **GREEDY)
        assert again.timings.reused_tokens == 64 and (again.token_ids, again.logprobs) == before


def test_cancelled_work_frees_its_pages(tiny: Path, native_answer: Any) -> None:
    with native(tiny) as llm:
        everything = free_pages(llm)
        for taken in (0, 1, 3, 20):
            streams = [llm.stream("def " + "x" * i, max_tokens=120, ignore_eos=True) for i in range(5)]
            for stream in streams:
                for _ in range(taken):
                    next(stream)
            assert taken == 0 or free_pages(llm) <= everything - 5
            for stream in streams:
                stream.close()
            assert free_pages(llm) == everything and not backend_of(llm)._sequences
        assert answer(llm) == native_answer


def test_an_interrupted_step_frees_its_pages(tiny: Path, native_answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a prompt: the request ends, and nothing of it is found in the cache by the next one."""
    with native(tiny) as llm:
        backend = backend_of(llm)
        run, calls = backend._run, []

        def interrupted(*args: Any, **options: Any) -> None:
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            run(*args, **options)

        prompt = [5 + i % 50 for i in range(150)]
        with monkeypatch.context() as patch:
            patch.setattr(native_backend, "ROWS", 40)
            before = answer(llm, prompt[:100])
            patch.setattr(backend, "_run", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.generate([[9, *prompt], [8, *prompt]], **GREEDY)
        assert free_pages(llm) == backend._pages.n_pages and not backend._sequences
        assert answer(llm, prompt[:100]) == before and answer(llm) == native_answer


def test_scores_of_broken_weights_are_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """One row of the head is no number, whatever the bits of that: no probability of any token is one."""
    path = make_model()
    for bits in (0x7FC00000, 0xFFFFFFFF, 0x7F800001):
        with open_checkpoint(path) as stored:
            weights = {name: stored[name] for name in stored}
            weights["output.weight"][7] = np.array(bits, np.uint32).view(np.float32)
            broken = checkpoint.save(tmp_path / f"{bits:x}", stored.config, weights, tokenizer=stored.tokenizer)
        with native(broken) as llm:
            with pytest.raises(HerdError, match="not numbers"):
                llm.score([5, 6, 7])
            with pytest.raises(HerdError, match="not numbers"):
                answer(llm)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_rows_of_the_head_without_a_token_have_no_probability(make_model: Callable[..., Path], backend: str) -> None:
    """A head that is padded beyond the tokenizer: scores and choices are of the same distribution."""
    pytest.importorskip("torch")
    with LLM(make_model(vocab_size=640), backend=backend, kv="f32") as llm:
        assert llm.tokenizer.vocab_size < 640
        completion = llm.generate([5, 6], temperature=0, max_tokens=10, ignore_eos=True, logprobs=True)
        assert completion.logprobs is not None
        scored = llm.score([5, 6, *completion.token_ids]).logprobs[1:]
        np.testing.assert_allclose(scored, completion.logprobs, atol=1e-5)
        with pytest.raises(UsageError, match=r"stands for no token; got 639"):
            llm.score([5, 639])


def test_scoring_leaves_the_remembered_prompts_alone(tiny: Path) -> None:
    with native(tiny) as llm:
        prompt = [5 + i % 50 for i in range(140)]
        answer(llm, prompt)
        for i in range(10):
            llm.score([i + 9] * 190)
        assert llm.generate(prompt, **GREEDY).timings.reused_tokens == 128


@pytest.mark.usefixtures("cramped")
def test_scoring_beside_streams_that_fill_the_cache(tiny: Path) -> None:
    """Room for one sequence of full context: a text is scored although a stream holds most of it."""
    with native(tiny) as llm:
        assert backend_of(llm)._pages.n_pages == CONTEXT // 64
        expected = llm.score([5] * 150).logprobs
        stream = llm.stream([6] * 130, max_tokens=50, ignore_eos=True)
        next(stream)
        assert llm.score([5] * 150).logprobs == expected
        assert len([*stream]) == 49


def test_a_larger_context_is_advised_only_where_there_is_one(tiny: Path) -> None:
    for ctx, advised in ((64, True), (None, False)):
        with native(tiny, ctx=ctx) as llm, pytest.raises(ContextLengthExceeded) as caught:
            llm.generate([5] * 1000)
        assert ("larger ctx" in str(caught.value)) == advised
