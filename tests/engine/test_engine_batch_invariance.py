"""On the native engine a request's tokens and log-probabilities do not depend on what else runs, to the last bit.

Whatever the batch, the pieces a prompt enters in, the rows of a native call, the threads, a prefix that is in the cache
already, or a sequence that had to give its place back and was computed again: each request is answered exactly as it is
alone. That is what makes seeds reproducible, and speculation and prefix caching exact.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from herd import LLM, UsageError
from herd.engine import Completion, scheduler
from herd.engine.memory import MemoryPlan

pytest.importorskip("herd._native")

from herd.engine import native_backend

CONTEXT = 256
LENGTHS = (1, 2, 9, 15, 16, 17, 40, 63, 64, 65, 100, 130)
GREEDY = {"temperature": 0.0, "max_tokens": 9, "ignore_eos": True, "logprobs": True}
SEEDED = {**GREEDY, "temperature": 1.1, "seed": 5, "top_logprobs": 2}
Answer = tuple[list[int], list[float] | None, Any]

# Weights and caches of every kind, and every pair of kinds in the slow test.
KINDS = [
    ("f32", "f32"), ("bf16", "bf16"), ("q8_0", "bf16"), ("q4_0", "int8"), ("q4_k_m", "bf16"), ("int4_g32", "bf16")
]  # fmt: skip
ALL_KINDS = list(itertools.product(["f32", "bf16", "q8_0", "q4_0", "q4_k_m", "q2_k"], ["f32", "bf16", "int8"]))


@pytest.fixture(scope="module")
def wide(make_model: Callable[..., Path]) -> Path:
    """Rows of 256 weights, as the K formats have them, and head widths and counts of no round number."""
    return make_model(
        talkative=True, dim=256, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=24, ffn_dim=512, context_length=CONTEXT
    )


@pytest.fixture(scope="module")
def mixture(make_model: Callable[..., Path]) -> Path:
    """A Llama 4: rows meet different experts, so that a batch is cut differently in every step."""
    from herd.architecture import AttentionTemperature, MoeConfig

    return make_model(
        generation="llama4", n_layers=4, moe=MoeConfig(n_experts=4, ffn_dim=40, top_k=2), nope_interval=4,
        attention_chunk=24, qk_norm=True, attention_temperature=AttentionTemperature(16, 0.1), context_length=CONTEXT,
    )  # fmt: skip


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    """Prompts that begin differently: none finds another's pages."""
    return [[5 + i, *(5 + (i * 131 + j * 37) % 500 for j in range(1, n))] for i, n in enumerate(lengths)]


PROMPTS = prompts_of(LENGTHS)


def answer(completion: Completion) -> Answer:
    return completion.token_ids, completion.logprobs, completion.top_logprobs


def answers(llm: LLM, prompts: list[list[int]], **options: Any) -> list[Answer]:
    return [answer(completion) for completion in llm.generate(prompts, **options)]


def alone(path: Path, prompts: list[list[int]] = PROMPTS, **how: Any) -> tuple[list[Answer], list[Answer]]:
    """The definition: one request after the other, by one thread, nothing remembered."""
    results: tuple[list[Answer], list[Answer]] = ([], [])
    for options, found in zip((GREEDY, SEEDED), results, strict=True):
        with LLM(path, backend="native", threads=1, **how) as llm:
            found += [answer(llm.generate(prompt, **options)) for prompt in prompts]
    return results


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(kind))
def kind(request: pytest.FixtureRequest, wide: Path) -> tuple[dict[str, str], list[Answer], list[Answer]]:
    quant, kv = request.param
    how = {"quant": quant, "kv": kv}
    greedy, seeded = alone(wide, **how)
    assert len({tuple(ids) for ids, _, _ in greedy}) > len(PROMPTS) // 2, "answers that are alike prove little"
    return how, greedy, seeded


def test_in_batches_of_any_size(wide: Path, kind: Any) -> None:
    how, greedy, seeded = kind
    for size in (2, 3, 5, 8, 12, 33, 64):
        with LLM(wide, backend="native", threads=2, **how) as llm:
            crowd = list(itertools.islice(itertools.cycle(range(len(PROMPTS))), size))
            prompts = [PROMPTS[i] for i in crowd]
            assert answers(llm, prompts, **GREEDY) == [greedy[i] for i in crowd], f"{size} together"
            assert answers(llm, prompts, **SEEDED) == [seeded[i] for i in crowd], f"{size} together"


@pytest.mark.parametrize("pieces", [1, 7, 64])
def test_in_pieces_of_any_length(wide: Path, kind: Any, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    how, _, seeded = kind
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", pieces)
    with LLM(wide, backend="native", threads=1, **how) as llm:
        assert answers(llm, PROMPTS, **SEEDED) == seeded


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_in_native_calls_of_any_size(wide: Path, kind: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    how, greedy, _ = kind
    monkeypatch.setattr(native_backend, "ROWS", rows)
    with LLM(wide, backend="native", threads=1, **how) as llm:
        assert answers(llm, PROMPTS, **GREEDY) == greedy


def test_with_a_prefix_in_the_cache(wide: Path, kind: Any) -> None:
    """The same prompts again, and after a longer text that begins with them."""
    how, greedy, seeded = kind
    with LLM(wide, backend="native", threads=1, **how) as llm:
        first = llm.generate(PROMPTS, **GREEDY)
        again = llm.generate(PROMPTS, **GREEDY)
        assert [answer(c) for c in first] == [answer(c) for c in again] == greedy
        assert [c.timings.reused_tokens for c in first] == [0] * len(PROMPTS)
        assert [c.timings.reused_tokens for c in again] == [(n - 1) // 64 * 64 for n in LENGTHS]
        assert answers(llm, PROMPTS, **SEEDED) == seeded
    with LLM(wide, backend="native", threads=1, **how) as llm:
        llm.generate([[*prompt, *range(200, 270)] for prompt in PROMPTS], max_tokens=1)
        assert answers(llm, PROMPTS, **GREEDY) == greedy


@pytest.mark.parametrize("page_tokens", [16, 48, 256])
def test_pages_of_any_size(wide: Path, page_tokens: int) -> None:
    with LLM(wide, backend="native", threads=1) as llm:
        greedy, seeded = answers(llm, PROMPTS, **GREEDY), answers(llm, PROMPTS, **SEEDED)
    with LLM(wide, backend="native", threads=1, page_tokens=page_tokens) as llm:
        assert answers(llm, PROMPTS, **GREEDY) == greedy
        assert answers(llm, PROMPTS, **SEEDED) == seeded
        reused = [c.timings.reused_tokens for c in llm.generate(PROMPTS, **GREEDY)]
        assert reused == [(n - 1) // page_tokens * page_tokens for n in LENGTHS]


def test_a_page_has_whole_tiles(wide: Path) -> None:
    with pytest.raises(UsageError, match="multiple of 16"):
        LLM(wide, page_tokens=40)


def cramped(monkeypatch: pytest.MonkeyPatch, spare_pages: int = 0) -> None:
    """Memory for the pages of one context, and hardly more: sequences must give way to each other."""
    plan_native = native_backend.plan_native

    def plan(*args: Any, **options: Any) -> MemoryPlan:
        made = plan_native(*args, **options)
        page = made.cache_per_token * 64
        return dataclasses.replace(made, free=made.needed + 2 * spare_pages * page)

    monkeypatch.setattr(native_backend, "plan_native", plan)


@pytest.fixture
def comebacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts sequences that had to give their place back."""
    counted = [0]
    reserve = native_backend.NativeBackend.reserve

    def counting(self: Any, *args: Any, **options: Any) -> Any:
        reserved = reserve(self, *args, **options)
        counted[0] += reserved is not None
        return reserved

    monkeypatch.setattr(native_backend.NativeBackend, "reserve", counting)
    return counted


@pytest.mark.parametrize("draft", [None, "ngram", "model"])
def test_after_giving_way(
    wide: Path, kind: Any, draft: str | None, monkeypatch: pytest.MonkeyPatch, comebacks: list[int]
) -> None:
    """With room for four pages, sequences that grow to two or three pages each are taken back and computed again."""
    how, *_ = kind
    prompts = prompts_of((3, 60, 63, 64, 100, 126, 5))
    options = {**SEEDED, "max_tokens": 75}
    with LLM(wide, backend="native", threads=1, **how) as llm:
        expected = [answer(llm.generate(prompt, **options)) for prompt in prompts]
    cramped(monkeypatch)
    comebacks[0] = 0
    with LLM(wide, backend="native", threads=1, draft=str(wide) if draft == "model" else draft, **how) as llm:
        assert answers(llm, prompts, **options) == expected
        assert comebacks[0] > len(prompts) or draft == "model", "nobody had to give way"
        assert llm._backend._pages.available == 4


def test_several_completions_of_a_prompt(wide: Path, kind: Any) -> None:
    """Siblings share the prompt's pages, the last of them in part."""
    how, *_ = kind
    options = {**SEEDED, "max_tokens": 30}
    with LLM(wide, backend="native", threads=1, **how) as llm:
        for prompt in (PROMPTS[3], PROMPTS[8], PROMPTS[9]):
            together = llm.generate(prompt, n=5, **options)
            for completion in together:
                assert answer(llm.generate(prompt, **{**options, "seed": completion.seed})) == answer(completion)


def test_scores_and_vectors(wide: Path, kind: Any) -> None:
    """A text's score is the same in a list, in calls of any size, and beside a running stream."""
    how, *_ = kind
    with LLM(wide, backend="native", threads=1, **how) as llm:
        expected = [llm.score(prompt).logprobs for prompt in PROMPTS]
        vectors = [llm.embed(prompt).tobytes() for prompt in PROMPTS]
    with LLM(wide, backend="native", threads=2, **how) as llm:
        stream = llm.stream("def ", max_tokens=100, ignore_eos=True)
        next(stream)
        assert [score.logprobs for score in llm.score(PROMPTS)] == expected
        assert [vector.tobytes() for vector in llm.embed(PROMPTS)] == vectors
        stream.close()


@pytest.mark.parametrize("how", [{"kv": "f32"}, {"quant": "bf16", "kv": "bf16"}], ids=["f32", "bf16"])
def test_every_architecture_in_a_crowd(mixture: Path, how: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtures of experts, chunks, layers without rotation: all that depends on the batch's make-up could show here."""
    greedy, seeded = alone(mixture, **how)
    for threads in (1, 2):
        with LLM(mixture, backend="native", threads=threads, **how) as llm:
            assert answers(llm, PROMPTS * 3, **SEEDED) == seeded * 3
            assert answers(llm, PROMPTS[::-1], **GREEDY) == greedy[::-1]
    for pieces, rows in ((7, 512), (64, 5)):
        monkeypatch.setattr(scheduler, "PREFILL_TOKENS", pieces)
        monkeypatch.setattr(native_backend, "ROWS", rows)
        with LLM(mixture, backend="native", threads=1, **how) as llm:
            assert answers(llm, PROMPTS, **SEEDED) == seeded


@pytest.mark.parametrize(("quant", "kv"), [("f32", "f32"), ("bf16", "bf16"), ("q4_0", "int8")], ids="-".join)
def test_texts_of_several_parts(
    make_model: Callable[..., Path], quant: str, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The softmax over more than 256 keys is taken in parts."""
    path, prompts = (
        make_model(talkative=True, dim=64, head_dim=32, context_length=640),
        prompts_of((250, 256, 257, 300, 530)),
    )
    greedy, seeded = alone(path, prompts, quant=quant, kv=kv)
    for pieces, rows, draft in ((1024, 512, None), (7, 512, None), (64, 5, "ngram")):
        monkeypatch.setattr(scheduler, "PREFILL_TOKENS", pieces)
        monkeypatch.setattr(native_backend, "ROWS", rows)
        with LLM(path, backend="native", quant=quant, kv=kv, threads=2, draft=draft) as llm:
            for _ in range(2):  # the second time with pages that are remembered
                assert answers(llm, prompts, **GREEDY) == greedy
            assert answers(llm, prompts, **SEEDED) == seeded


@pytest.mark.parametrize("draft", ["ngram", "model"])
def test_with_guesses(wide: Path, kind: Any, draft: str) -> None:
    """Speculation changes how many steps it takes, and nothing else."""
    how, greedy, seeded = kind
    guesser = "ngram" if draft == "ngram" else str(wide)
    with LLM(wide, backend="native", threads=1, draft=guesser, **how) as llm:
        assert answers(llm, PROMPTS, **GREEDY) == greedy
        assert answers(llm, PROMPTS, **SEEDED) == seeded
        repeated = llm.generate(PROMPTS[4], **{**GREEDY, "max_tokens": 100})
    with LLM(wide, backend="native", threads=1, **how) as llm:
        assert answer(llm.generate(PROMPTS[4], **{**GREEDY, "max_tokens": 100})) == answer(repeated)
    timings = repeated.timings
    if draft == "model":  # the same weights, as they are stored: right for itself, mostly wrong for the rounded ones
        assert 20 < timings.accepted_tokens <= timings.drafted_tokens
        assert how["quant"] != "f32" or timings.accepted_tokens == timings.drafted_tokens


@pytest.mark.slow
@pytest.mark.parametrize(("quant", "kv"), ALL_KINDS, ids=lambda kind: "-".join(kind))
def test_every_pair_of_formats(wide: Path, quant: str, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy, seeded = alone(wide, quant=quant, kv=kv)
    for pieces, rows, threads in ((1024, 512, 2), (7, 5, 1), (64, 33, 2)):
        monkeypatch.setattr(scheduler, "PREFILL_TOKENS", pieces)
        monkeypatch.setattr(native_backend, "ROWS", rows)
        with LLM(wide, backend="native", quant=quant, kv=kv, threads=threads) as llm:
            assert answers(llm, PROMPTS * 4, **GREEDY) == greedy * 4
            assert answers(llm, PROMPTS * 2, **SEEDED) == seeded * 2
