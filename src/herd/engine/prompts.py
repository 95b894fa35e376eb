"""Prompts from outside, and texts longer than the context as windows of it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from herd.engine.request import check_whole
from herd.errors import UsageError

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer

Prompt = str | list[int]
Prompts = list[str] | list[list[int]]


def check_ids(ids: Sequence[int], vocabulary: int) -> list[int]:
    """Ids as Python's ints, at least one, each below `vocabulary`; else UsageError."""
    try:
        result = [operator.index(token_id) for token_id in ids]
    except TypeError:
        raise UsageError("not a list of token ids", value=ids) from None
    if not result:
        raise UsageError("an empty prompt has no next token", fix="begin with the tokenizer's bos_id")
    if min(result) < 0 or max(result) >= vocabulary:
        wrong = next(i for i in result if not 0 <= i < vocabulary)
        raise UsageError("no such token", value=wrong, allowed=f"0 to {vocabulary - 1}")
    return result


def several_of(prompt: Prompt | Prompts) -> tuple[Sequence[Prompt], bool]:
    """A list of prompts, and whether it was a single one."""
    if isinstance(prompt, str):
        return [prompt], True
    if not isinstance(prompt, Sequence | np.ndarray):
        raise UsageError("not a prompt", value=prompt, allowed="a text, a list of token ids, or a list of those")
    if len(prompt) and not isinstance(prompt[0], str | Sequence | np.ndarray):
        return [cast("list[int]", prompt)], True
    return cast("Sequence[Prompt]", prompt), False


def n_bytes(tokenizer: Tokenizer, text: object, ids: Sequence[int]) -> int:
    """Bytes of a prompt: of its text, or of all its ids but the first."""
    if isinstance(text, str):
        return len(text.encode("utf-8", "surrogatepass"))  # a lone surrogate has 3 bytes, as U+FFFD in its place
    return sum(len(tokenizer.token_bytes(token_id)) for token_id in ids[1:])


def windowed(length: int, context: int, overlap: int | None) -> Iterator[tuple[int, int]]:
    """(start of window, first token that is scored in it): together they score tokens 1.. once each.

    A token that is scored in a further window has at least `overlap` tokens before it there.
    """
    overlap = None if overlap is None else check_whole("overlap", overlap, 1, context - 1)
    start, fresh = 0, 1
    yield start, fresh
    while overlap is not None and start + context < length:
        fresh = start + context
        start = fresh - overlap
        yield start, fresh
