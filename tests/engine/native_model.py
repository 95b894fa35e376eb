"""The tiny model on the native engine, and what tests look at in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from herd import LLM
from herd.engine.native_backend import NativeBackend

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
