"""Guesses at the next tokens, which the model then checks in one step (Leviathan et al., arXiv 2211.17192).

A step reads all weights whether it computes one row or a few, so checking guesses costs little, and every right guess
saves a step. What is chosen does not change: each position's token is drawn from the model's own logits with the
request's own random number, and a guess counts only if it is that token. So speculation is exact for greedy decoding
and for seeded sampling alike, wherever a row's logits do not depend on the rows beside it (the native backend).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from herd.engine.backend import Backend, BackendOptions, Span, open_backend
from herd.errors import OutOfMemory, UsageError

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer

MAX_DRAFT = 8
"""Tokens guessed at a time, at most."""


@dataclass(frozen=True)
class Ask:
    """Guess up to `n` tokens after `tokens`; `key` is the sequence's identity as long as it runs."""

    key: int
    tokens: Sequence[int]
    n: int


class Drafter(Protocol):
    """Where guesses come from."""

    memory: int
    """Bytes that its model takes at most."""

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Guesses for each, none to `n` of them."""

    def forget(self, key: int) -> None:
        """The sequence has ended."""

    def close(self) -> None:
        """Free what is held."""


class NgramDrafter:
    """Prompt look-up: what followed when the last tokens stood in this text before. It needs no second model.

    The longest of the last `longest` … `shortest` tokens that occurred before counts, at its latest place.
    """

    memory = 0

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        # For each sequence: what was indexed of it, and for each n-gram the place after its latest occurrence.
        self._places: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        return [self._follow(ask) for ask in asks]

    def forget(self, key: int) -> None:
        self._places.pop(key, None)

    def close(self) -> None:
        self._places.clear()

    def _follow(self, ask: Ask) -> list[int]:
        tokens = ask.tokens
        done, places = self._places.get(ask.key, (0, {}))
        for end in range(done + 1, len(tokens)):  # n-grams that end before the last token: something follows them
            for size in self._sizes:
                if size <= end:
                    places[tuple(tokens[end - size : end])] = end
        self._places[ask.key] = (max(done, len(tokens) - 1), places)
        for size in self._sizes:
            place = places.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if place is not None:
                return list(tokens[place : place + ask.n])
        return []


class ModelDrafter:
    """A smaller model of the same vocabulary, decoding greedily for all sequences together."""

    def __init__(self, backend: Backend, vocabulary: int) -> None:
        """`vocabulary`: ids that have a text; rows of its head beyond it are padding."""
        self.memory = backend.memory
        self._backend = backend
        self._vocabulary = vocabulary
        self._held: dict[int, tuple[int, list[int]]] = {}  # key -> its sequence there, and the tokens that one has

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        guesses: list[list[int]] = [[] for _ in asks]
        handles = [self._catch_up(ask) for ask in asks]
        pending = [list(ask.tokens[len(self._tokens(ask.key)) :]) for ask in asks]
        while True:
            active = [
                i for i, ask in enumerate(asks) if handles[i] is not None and len(guesses[i]) < ask.n and pending[i]
            ]
            active = [i for i in active if self._fits(handles[i], len(pending[i]), asks[i])]
            if not active:
                return guesses
            spans = [Span(handles[i] or 0, pending[i]) for i in active]
            best = self._backend.step(spans)[:, : self._vocabulary].argmax(axis=1).tolist()
            for i, token in zip(active, best, strict=True):
                self._tokens(asks[i].key).extend(pending[i])
                guesses[i].append(token)
                pending[i] = [token]

    def forget(self, key: int) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._backend.release(held[0])

    def close(self) -> None:
        self._held.clear()
        self._backend.close()

    def _tokens(self, key: int) -> list[int]:
        held = self._held.get(key)
        return [] if held is None else held[1]

    def _fits(self, handle: int | None, n_tokens: int, ask: Ask) -> bool:
        if handle is None or len(self._tokens(ask.key)) + n_tokens > self._backend.context:
            return False
        return self._backend.grow(handle, n_tokens)

    def _catch_up(self, ask: Ask) -> int | None:
        """The draft model's sequence, cut back to where it agrees with `ask.tokens`; None without room for one."""
        held = self._held.get(ask.key)
        if held is None:
            reserved = self._backend.reserve(self._backend.context, ask.tokens)
            if reserved is None:
                return None
            handle, n_reused = reserved
            self._held[ask.key] = (handle, list(ask.tokens[:n_reused]))
            return handle
        handle, tokens = held
        same = next((i for i, (a, b) in enumerate(zip(tokens, ask.tokens, strict=False)) if a != b), len(tokens))
        same = min(same, len(ask.tokens) - 1)  # at least one token is computed, for its logits
        if same < len(tokens):
            self._backend.truncate(handle, same)
            del tokens[same:]
        return handle


def open_drafter(
    draft: str | Path, target: Backend, tokenizer: Tokenizer, backend: str, options: BackendOptions
) -> Drafter:
    """What `LLM(draft=…)` names: "ngram", or a model of the same vocabulary, loaded as `target` was by `options`."""
    from herd import checkpoint
    from herd.tokenizer import load

    if draft == "ngram":
        return NgramDrafter()
    path = checkpoint.resolve(str(draft))
    theirs = load(path)
    if [theirs.token_bytes(i) for i in range(theirs.vocab_size)] != [
        tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)
    ]:
        raise UsageError("the draft model has another vocabulary", value=path, fix='use draft="ngram"')
    with checkpoint.open_checkpoint(path) as opened:
        context = min(target.context, opened.config.context_length)
    left = None if options.memory is None else options.memory - target.memory
    how = replace(options, path=path, quant=None, ctx=context, promised=target.promised, memory=left)
    try:
        return ModelDrafter(open_backend(backend, how), tokenizer.vocab_size)
    except OutOfMemory as error:
        fix, both = 'use a smaller draft model, or draft="ngram"', target.memory + error.needed
        if options.memory is not None:  # the larger model takes half of what the limit leaves it for more cache
            both = 2 * both - options.memory
        raise OutOfMemory(f"for the draft model: {error.what}", both, value=str(error.value), fix=fix) from None
