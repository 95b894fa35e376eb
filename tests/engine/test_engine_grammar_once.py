"""A grammar is tried when it is asked for, and never again by the batch, which would stand still for that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("herd._native")
pytest.importorskip("llguidance")

import herd
from herd.engine import Grammar, Sampling
from herd.engine import grammar_trial as trials


def test_the_batch_does_not_try_a_grammar_again(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one that has been forgotten meanwhile."""
    tried: list[str] = []
    error = trials.Trial.error

    def noted(self: trials.Trial, source: str) -> str | None:
        tried.append(source)
        return error(self, source)

    monkeypatch.setattr(trials.Trial, "error", noted)
    monkeypatch.setattr("herd.engine.constraint.REMEMBERED", 1)
    with herd.LLM(make_model(talkative=True), threads=1) as llm:
        first, second = (Sampling(grammar=Grammar.regex(f"[a-f]{{{n}}}"), max_tokens=20) for n in (3, 4))
        ids = llm.chat_ids([{"role": "user", "content": "x"}])
        llm.max_tokens(ids, first)
        llm.max_tokens(ids, second)
        assert len(tried) == 2
        (answer,) = llm.begin(ids, first)
        assert len(tried) == 2
        while answer.completion is None:
            llm.step()
        assert len(answer.completion.text) == 3 and set(answer.completion.text) <= set("abcdef")
        llm.max_tokens(ids, first)  # forgotten: it is tried again, where nobody waits for it
        assert len(tried) == 3
