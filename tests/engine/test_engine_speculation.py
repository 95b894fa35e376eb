"""Speculation changes no token and no bit, whatever guesses, and saves the steps it says; n-grams found as stated."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd import LLM, UsageError, checkpoint, tokenizer
from herd.engine import native_backend, scheduler
from herd.engine.speculation import MAX_DRAFT, Ask, NgramDrafter

PROMPTS = ["def f(x):\n    return x\n" * 4, "import os", "for i in range(3): " * 5, "x"]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 8))
def test_ngrams_against_a_plain_search(tokens: list[int], n: int) -> None:
    """The longest ending of 4 to 2 tokens that occurred before, at its latest place, in a text that grows."""
    drafter = NgramDrafter()
    for length in range(1, len(tokens) + 1):
        text = tokens[:length]
        expected: list[int] = []
        for size in (4, 3, 2):
            places = [end for end in range(size, length) if text[end - size : end] == text[length - size :]]
            if size <= length and places:
                expected = text[places[-1] : places[-1] + n]
                break
        assert drafter.propose([Ask(1, text, n)]) == [expected]


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Path]) -> tuple[Path, Path]:
    """A model, and one whose choices are often the same."""
    path = make_model(talkative=True)
    with checkpoint.open_checkpoint(path) as opened:
        rng = np.random.default_rng(1)
        near = {name: opened[name] + rng.normal(0, 0.02, opened.shape(name)).astype(np.float32) for name in opened}
        draft = path.parent / "draft"
        checkpoint.save(draft, opened.config, near, format="hf", dtype="f32", tokenizer=opened.tokenizer)
    return path, draft


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.3}])
@pytest.mark.parametrize("drafter", ["ngram", "near", "same"])
def test_answers_are_equal_to_the_bit(
    models: tuple[Path, Path], drafter: str, sampling: dict[str, Any], kv: str
) -> None:
    path, near = models
    options: dict[str, Any] = {"max_tokens": 60, "top_logprobs": 3, **sampling}
    with LLM(path, kv=kv, quant="q8_0") as plain:
        expected = [plain.generate(prompt, **options) for prompt in PROMPTS]
    draft = {"ngram": "ngram", "near": near, "same": path}[drafter]
    with LLM(path, kv=kv, quant="q8_0", draft=draft) as llm:
        together = llm.generate(PROMPTS, **options)
        alone = [llm.generate(prompt, **options) for prompt in PROMPTS]
    for one, two, three in zip(expected, together, alone, strict=True):
        for other in (two, three):
            assert (other.token_ids, other.logprobs) == (one.token_ids, one.logprobs)
            assert (other.text, other.top_logprobs) == (one.text, one.top_logprobs)
            assert other.timings.accepted_tokens <= other.timings.drafted_tokens


def test_right_guesses_save_steps(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model as its own drafter every guess is right: 1 + MAX_DRAFT tokens a step."""
    path, _ = models
    steps: list[int] = []
    step = native_backend.NativeBackend.step

    def counted(self: native_backend.NativeBackend, spans: Any) -> Any:
        steps.append(id(self))
        return step(self, spans)

    monkeypatch.setattr(native_backend.NativeBackend, "step", counted)
    with LLM(path, kv="f32", draft=path) as llm:
        completion = llm.generate("def ", max_tokens=46, temperature=0)
        own = steps.count(id(llm._backend))
    assert completion.timings.accepted_tokens == completion.timings.drafted_tokens == 40
    assert own == 1 + 5 and MAX_DRAFT == 8  # the prompt, then 45 tokens, nine in a step


def test_stops_and_limits_hold(models: tuple[Path, Path]) -> None:
    """A stop string among accepted guesses ends the text where it stands, and no answer is longer than it may be."""
    path, _ = models
    with LLM(path, kv="f32") as plain, LLM(path, kv="f32", draft=path) as llm:
        whole = plain.generate("def ", max_tokens=40, temperature=0).text
        stop = whole[len(whole) // 2 :][:3]
        for options in ({"stop": stop}, {"max_tokens": 3}, {"max_tokens": plain.context - 10}, {"n": 2}):
            ask: dict[str, Any] = {"temperature": 0, "max_tokens": 40, **options}
            assert (
                str(plain.generate("def ", **ask)).split("timings")[0]
                == str(llm.generate("def ", **ask)).split("timings")[0]
            )
        stream = llm.stream("def ", max_tokens=30, temperature=0)
        for _ in range(5):
            next(stream)
        stream.close()
        assert llm.generate("def ", max_tokens=40, temperature=0).text == whole


def test_the_draft_model_must_have_the_same_vocabulary(
    models: tuple[Path, Path], make_model: Callable[..., Path]
) -> None:
    other = make_model(small=tokenizer.train([Path(argparse.__file__).read_text()], 600))
    with pytest.raises(UsageError, match="vocabulary"):
        LLM(models[0], draft=other)


def test_a_draft_model_with_a_padded_head(models: tuple[Path, Path], make_model: Callable[..., Path]) -> None:
    """Rows beyond the tokenizer are no guesses, even where they are the largest."""
    path, _ = models
    padded = make_model(vocab_size=640)
    with checkpoint.open_checkpoint(padded) as opened:
        weights = {name: opened[name] for name in opened}
        weights["output.weight"][620:] *= 50
        loud = checkpoint.save(path.parent / "loud", opened.config, weights, tokenizer=opened.tokenizer)
    with LLM(path, kv="f32") as plain, LLM(path, kv="f32", draft=loud) as llm:
        ask: dict[str, Any] = {"max_tokens": 40, "temperature": 0}
        assert llm.generate("def ", **ask).token_ids == plain.generate("def ", **ask).token_ids


def test_a_draft_model_on_the_torch_backend(models: tuple[Path, Path]) -> None:
    pytest.importorskip("torch")
    path, near = models
    with LLM(path, kv="f32", backend="torch") as plain, LLM(path, kv="f32", backend="torch", draft=near) as llm:
        ask: dict[str, Any] = {"max_tokens": 150, "temperature": 0}
        one, other = plain.generate("def ", **ask), llm.generate("def ", **ask)
        assert other.token_ids == one.token_ids and other.timings.accepted_tokens > 0


def test_a_crowd_asks_for_no_more_rows_than_fit(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses and sequences together: at most as many rows of logits as sequences may run."""
    path, _ = models
    rows: list[int] = []
    step = native_backend.NativeBackend.step

    def counted(self: native_backend.NativeBackend, spans: Any) -> Any:
        rows.append(sum(span.outputs for span in spans))
        return step(self, spans)

    monkeypatch.setattr(scheduler, "LOGIT_ROWS", 10)
    with LLM(path, kv="f32", draft=path) as llm:
        monkeypatch.setattr(native_backend.NativeBackend, "step", counted)
        llm.generate(["def ", "a", "b", "c"], max_tokens=30, temperature=0)
    assert max(rows) <= 10
