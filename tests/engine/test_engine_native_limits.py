"""The native engine at its limits: wrong ids, full contexts, broken weights, cancelled work, forks, threads, long use.

Whatever happens, it says what was wrong, frees what it held, and answers the next request as if nothing had been.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from herd import LLM, ContextLengthExceeded, HerdError, ResourceError, UsageError, checkpoint, tokenizer
from herd.architecture import LlamaConfig, MoeConfig, tensor_shapes
from herd.checkpoint import open_checkpoint
from herd.engine.backend import BackendOptions, Span
from herd.engine.memory import MemoryPlan

pytest.importorskip("herd._native")

from herd.engine import native_backend
from herd.engine.native_backend import NativeBackend
from herd.engine.native_weights import Need, plan_native, weight_formats

CONTEXT = 192
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "logprobs": True}


def native(path: Path, **how: Any) -> LLM:
    return LLM(path, backend="native", **{"threads": 1, **how})


def backend_of(llm: LLM) -> NativeBackend:
    assert isinstance(llm._backend, NativeBackend)
    return llm._backend


def free_pages(llm: LLM) -> int:
    return backend_of(llm)._pages.available


def answer(llm: LLM, prompt: Any = "def ", **more: Any) -> tuple[list[int], list[float] | None]:
    completion = llm.generate(prompt, **{**GREEDY, **more})
    return completion.token_ids, completion.logprobs


@pytest.fixture(scope="module")
def expected(tiny: Path) -> tuple[list[int], list[float] | None]:
    with native(tiny) as llm:
        return answer(llm)


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
def test_one_broken_token_harms_only_those_who_use_it(
    tiny: Path, tmp_path: Path, kv: str, value: float, expected: tuple[list[int], list[float] | None]
) -> None:
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


def test_cancelled_work_frees_its_pages(tiny: Path, expected: Any) -> None:
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
        assert answer(llm) == expected


def test_an_interrupted_step_frees_its_pages(tiny: Path, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert answer(llm, prompt[:100]) == before and answer(llm) == expected


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_ctrl_c_in_a_long_prompt(kind: str, tmp_path: Path) -> None:
    """A real signal in the middle of a native call of about a second: the call ends, and the model is usable."""
    config = LlamaConfig(
        dim=1024, n_layers=3, n_heads=8, n_kv_heads=2, head_dim=128, ffn_dim=4096, vocab_size=64, context_length=2048
    )
    if kind == "mixture":
        moe = MoeConfig(n_experts=4, ffn_dim=2048, top_k=2)
        config = dataclasses.replace(config, moe=moe, generation="llama4")
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))
        for name, shape in tensor_shapes(config).items()
    }
    path = checkpoint.save(tmp_path / "m", config, weights, dtype="bf16")
    backend = native_backend.open_backend(BackendOptions(path=path, quant=None, ctx=None, threads=2, kv="bf16"))
    prompt = [i % 64 for i in range(2000)]
    fired: list[float] = []

    def fire() -> None:
        fired.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    for wait in (0.0, 0.02, 0.3):
        reserved = backend.reserve(2000)
        assert reserved is not None
        timer = threading.Timer(wait, fire)
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            backend.step([Span(reserved[0], prompt)])
            time.sleep(5)  # the step was over before the signal came
        assert time.perf_counter() - fired[-1] < 0.5, "measured: 0.03"
        timer.join()
        backend.release(reserved[0])
    assert np.isfinite(backend.score([prompt[:20]])[0]).all()
    backend.close()


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


def test_closing_frees_the_cache(tiny: Path) -> None:
    llm = native(tiny)
    cache = backend_of(llm)._cache
    llm.close()
    assert sys.getrefcount(cache) == 2, "only this test holds it, in a variable and for the call"


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


def test_two_models_in_one_process(tiny: Path, make_model: Callable[..., Path], expected: Any) -> None:
    """Answers in turns; each has threads, pages and working memory of its own."""
    other = make_model(seed=1, n_layers=3, dim=96, n_heads=4, head_dim=32)
    with native(other) as llm:
        theirs = answer(llm)
    assert theirs != expected
    with native(tiny, threads=2) as a, native(other, threads=2) as b:
        streams = [model.stream("def ", **GREEDY) for model in (a, b)]
        ids: list[list[int]] = [[], []]
        for _ in range(12):
            for found, stream in zip(ids, streams, strict=True):
                found.append(next(stream).token_id)
        assert ids == [expected[0], theirs[0]]
        a.close()
        assert answer(b) == theirs


own_memory = pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitiser's own memory is counted with the process's"
)


def large_bytes() -> int:
    """Anonymous memory of this process in large pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages:"))


@pytest.fixture(scope="module")
def heavy(make_model: Callable[..., Path]) -> Path:
    """Weights of some 80 MB, of which large pages are made after loading."""
    return make_model(dim=1024, n_heads=8, head_dim=128, ffn_dim=4096, context_length=256)


@own_memory
def test_weights_come_to_lie_in_large_pages(heavy: Path) -> None:
    before = large_bytes()
    with native(heavy) as llm:
        backend = backend_of(llm)
        assert backend._engine is not None
        first = answer(llm)
        backend.settle()
        if large_bytes() == before:
            pytest.skip("this system makes no large pages")
        assert large_bytes() - before > 0.8 * backend._engine.weight_bytes
        assert answer(llm) == first


def test_a_fork_right_after_loading(heavy: Path) -> None:
    """No large page is made from then on, parent and child end, and both answer alike."""
    with native(heavy) as llm:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                answer(llm)
                llm.close()
                code = 0
            finally:
                os._exit(code)
        after = large_bytes()
        time.sleep(0.3)
        assert large_bytes() <= after
        assert os.waitpid(pid, 0)[1] == 0


def test_a_failure_while_opening_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft model that does not fit, said as such; the model that was loaded before it is closed."""
    closed: list[object] = []
    close = NativeBackend.close
    monkeypatch.setattr(NativeBackend, "close", lambda self: (closed.append(self), close(self)))
    plans = native_backend.plan_native

    def second_does_not_fit(*args: Any) -> MemoryPlan:
        plan = plans(*args)
        return dataclasses.replace(plan, free=0) if args[2].promised else plan

    monkeypatch.setattr(native_backend, "plan_native", second_does_not_fit)
    with pytest.raises(ResourceError, match=r'for the draft model.*a smaller draft model, or draft="ngram"'):
        native(tiny, draft=tiny)
    assert len(closed) == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_after_a_fork(tiny: Path, threads: int, expected: Any) -> None:
    """A child process has the model and none of its threads: it starts its own. The parent goes on."""
    with native(tiny, threads=threads) as llm:
        assert answer(llm) == expected  # the parent's threads are running
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writer, pickle.dumps(answer(llm)))
                llm.close()
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        assert pickle.loads(said) == expected
        assert answer(llm) == expected


def test_many_callers_at_once(tiny: Path) -> None:
    """Threads that generate, stream, score, embed and give up: everybody gets what he gets alone."""
    prompts = [[5 + i, *range(10, 10 + 9 * i)] for i in range(6)]
    with native(tiny) as llm:
        answers = [answer(llm, prompt) for prompt in prompts]
        scores = [llm.score(prompt).logprobs for prompt in prompts]
        vectors = [llm.embed(prompt).tobytes() for prompt in prompts]
    wrong: list[object] = []
    with native(tiny, threads=2) as llm:

        def call(i: int) -> None:
            try:
                for _ in range(4):
                    assert answer(llm, prompts[i]) == answers[i]
                    assert [chunk.token_id for chunk in llm.stream(prompts[i], **GREEDY)] == answers[i][0]
                    given_up = llm.stream(prompts[i], **GREEDY)
                    next(given_up)
                    given_up.close()
                    assert llm.score(prompts[i]).logprobs == scores[i]
                    assert llm.embed(prompts[i]).tobytes() == vectors[i]
            except BaseException as error:  # a thread's failure is the test's
                wrong.append(error)

        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert free_pages(llm) == backend_of(llm)._pages.n_pages and llm._scheduler.idle


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def small_requests(llm: LLM, count: int) -> None:
    for i in range(count):
        llm.generate([5 + i % 500, 6 + i // 500], temperature=0, max_tokens=2)


@own_memory
@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_requests_leave_nothing_behind(tiny: Path, count: int, expected: Any) -> None:
    with native(tiny, ctx=64) as llm:
        small_requests(llm, 300)
        before, pages = resident_bytes(), free_pages(llm)
        small_requests(llm, count)
        assert free_pages(llm) == pages == backend_of(llm)._pages.n_pages
        assert not backend_of(llm)._sequences and llm._scheduler.idle
        assert resident_bytes() - before < 2 << 20
        assert answer(llm) == expected


@pytest.mark.parametrize("quant", ["f32", "q8_0", "q4_k_m", "q2_k"])
@pytest.mark.parametrize("kv", ["f32", "bf16", "int8"])
def test_the_memory_that_was_planned_is_enough(
    make_model: Callable[..., Path], wide: Path, quant: str, kv: Any
) -> None:
    """Weights, cache and the working memory of the largest step, with logits after its last 256 rows."""
    with open_checkpoint(wide) as stored:
        formats = weight_formats(stored, quant)
        plan = plan_native(stored, formats, Need(kv, native_backend.ROWS, outputs=256), context=1024)
    backend = native_backend.open_backend(BackendOptions(path=wide, quant=quant, ctx=1024, threads=2, kv=kv))
    reserved = backend.reserve(1024)
    assert reserved is not None
    backend.step([Span(reserved[0], [5] * native_backend.ROWS)])
    backend.step([Span(reserved[0], [5] * 256, outputs=256)])
    backend.score([[5] * 1000])
    assert backend._engine is not None and backend._cache is not None
    assert plan.weights <= backend._engine.weight_bytes <= plan.weights + (1 << 16)
    assert backend._cache.page_bytes <= plan.cache_per_token * backend._pages.page_tokens
    assert backend._engine.work_bytes + 256 * 4 * backend.config.vocab_size <= plan.work
    backend.close()


@pytest.fixture(scope="module")
def wide(make_model: Callable[..., Path]) -> Path:
    return make_model(dim=512, n_heads=8, head_dim=64, ffn_dim=1024, context_length=1024)


@pytest.mark.parametrize("cpus", [[4095], [0, 0], 0, "0,1", [-1], [1.5]])
def test_processors_that_are_not_there_are_refused(tiny: Path, cpus: Any) -> None:
    with pytest.raises(UsageError, match="processor"):
        native(tiny, cpus=cpus)


def test_a_larger_context_is_advised_only_where_there_is_one(tiny: Path) -> None:
    for ctx, advised in ((64, True), (None, False)):
        with native(tiny, ctx=ctx) as llm, pytest.raises(ContextLengthExceeded) as caught:
            llm.generate([5] * 1000)
        assert ("larger ctx" in str(caught.value)) == advised
