"""The native engine as part of a process: signals, forks, threads, other models beside it, memory, long use.

It takes the memory that it planned, ends a call when it is told to, and leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from herd import LLM, ResourceError, UsageError, checkpoint
from herd.architecture import LlamaConfig, MoeConfig, tensor_shapes
from herd.checkpoint import open_checkpoint
from herd.engine.backend import BackendOptions, Span
from herd.engine.memory import MemoryPlan

pytest.importorskip("herd._native")

from herd import _native
from herd.engine import native_backend
from herd.engine.native_backend import NativeBackend
from herd.engine.native_weights import Need, plan_native, weight_formats
from tests.engine.native_model import GREEDY, answer, backend_of, free_pages, native


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


def test_closing_frees_the_cache(tiny: Path) -> None:
    llm = native(tiny)
    cache = backend_of(llm)._cache
    llm.close()
    assert sys.getrefcount(cache) == 2, "only this test holds it, in a variable and for the call"


def test_two_models_in_one_process(tiny: Path, make_model: Callable[..., Path], native_answer: Any) -> None:
    """Answers in turns; each has threads, pages and working memory of its own."""
    other = make_model(seed=1, n_layers=3, dim=96, n_heads=4, head_dim=32)
    with native(other) as llm:
        theirs = answer(llm)
    assert theirs != native_answer
    with native(tiny, threads=2) as a, native(other, threads=2) as b:
        streams = [model.stream("def ", **GREEDY) for model in (a, b)]
        ids: list[list[int]] = [[], []]
        for _ in range(12):
            for found, stream in zip(ids, streams, strict=True):
                found.append(next(stream).token_id)
        assert ids == [native_answer[0], theirs[0]]
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


def makes_large_pages() -> bool:
    """Linux 6.1 and later, where they are not turned off."""
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    version = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    return version >= (6, 1) and switch.exists() and "[never]" not in switch.read_text()


@own_memory
@pytest.mark.skipif(not makes_large_pages(), reason="this system makes no large pages")
@pytest.mark.parametrize("patience", [0, 50_000_000])
def test_weights_come_to_lie_in_large_pages(heavy: Path, monkeypatch: pytest.MonkeyPatch, patience: int) -> None:
    """While they are read, or, without any patience for the system, afterwards."""
    monkeypatch.setattr(_native, "Engine", partial(_native.Engine, patience=patience))
    before = large_bytes()
    with native(heavy) as llm:
        backend = backend_of(llm)
        assert backend._engine is not None
        first = answer(llm)
        several = [threading.Thread(target=backend.settle) for _ in range(3)]  # only one of them can wait for a thread
        for thread in several:
            thread.start()
        for thread in several:
            thread.join(60)
            assert not thread.is_alive()
        assert large_bytes() - before > 0.8 * backend._engine.weight_bytes
        assert answer(llm) == first


@pytest.mark.parametrize("patience", [0, 50_000_000])
def test_a_fork_right_after_loading(heavy: Path, monkeypatch: pytest.MonkeyPatch, patience: int) -> None:
    """No large page is made from then on, parent and child end, and both answer alike."""
    monkeypatch.setattr(_native, "Engine", partial(_native.Engine, patience=patience))
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
def test_after_a_fork(tiny: Path, threads: int, native_answer: Any) -> None:
    """A child process has the model and none of its threads: it starts its own. The parent goes on."""
    with native(tiny, threads=threads) as llm:
        assert answer(llm) == native_answer  # the parent's threads are running
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
        assert pickle.loads(said) == native_answer
        assert answer(llm) == native_answer


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
def test_many_requests_leave_nothing_behind(tiny: Path, count: int, native_answer: Any) -> None:
    with native(tiny, ctx=64) as llm:
        small_requests(llm, 300)
        before, pages = resident_bytes(), free_pages(llm)
        small_requests(llm, count)
        assert free_pages(llm) == pages == backend_of(llm)._pages.n_pages
        assert not backend_of(llm)._sequences and llm._scheduler.idle
        assert resident_bytes() - before < 2 << 20
        assert answer(llm) == native_answer


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
