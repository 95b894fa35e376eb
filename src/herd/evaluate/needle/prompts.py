"""Prompts of a needle grid, exact to the token: a haystack with numbers hidden in it, then a question."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from herd.corpus import read_sources
from herd.errors import UsageError
from herd.evaluate.needle.config import NeedleConfig
from herd.evaluate.needle.wording import (
    CITIES,
    PREFIX,
    answer_ids,
    answer_room,
    needle_text,
    period_ids,
    question_ids,
)

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer


@dataclass(frozen=True)
class Haystack:
    """Token ids to cut haystacks from, each from the start. text_tokens: of the text, which repeats after them."""

    ids: Sequence[int]
    text_tokens: int

    @property
    def sha256(self) -> str:
        """Of the ids as 32-bit little-endian numbers."""
        return hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in self.ids)).hexdigest()


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt with what it asks for. `places`: where needles were put in, in tokens of the haystack."""

    ids: list[int]
    cities: tuple[str, ...]
    numbers: tuple[int, ...]
    answer: list[int]
    """The one number's tokens; empty where several are asked for."""
    places: tuple[int, ...]


def read_haystack(
    tokenizer: Tokenizer, sources: Sequence[str], tokens: int, generator_tokens: int | None = None
) -> Haystack:
    """The first `tokens` tokens of the sources' text; it repeats, after `generator_tokens` of it, where it is short.

    Raises UsageError for a source that does not exist, HerdError for one without text.
    """
    wanted = tokens if generator_tokens is None else min(tokens, generator_tokens)
    text = array("I")
    for document in read_sources(sources):
        text.extend(tokenizer.encode(document.text if document.text.endswith("\n") else document.text + "\n"))
        if len(text) >= wanted:
            break
    del text[wanted:]
    length = len(text)
    repeated = text * -(-tokens // length)
    del repeated[tokens:]
    return Haystack(repeated, length)


@dataclass(frozen=True)
class _Parts:
    """What a prompt is made of beside its haystack; `rng` goes on with the places of distractors."""

    rng: random.Random
    numbers: list[int]
    asked: list[int]
    needles: list[list[int]]
    question: list[int]


class PromptMaker:
    """Makes the prompts of a grid: every one is a function of the seed, its length, its depth and its number."""

    def __init__(self, tokenizer: Tokenizer, config: NeedleConfig) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._prefix = [tokenizer.bos_id, *tokenizer.encode(PREFIX)]
        self.room = answer_room(tokenizer, config.asked, config.digits)

    @cached_property
    def haystack(self) -> Haystack:
        """The text of all prompts; read when it is first needed. Raises as `read_haystack`."""
        config = self._config
        return read_haystack(self._tokenizer, config.haystack, max(config.lengths), config.generator_tokens)

    def read(self) -> Haystack:
        """The text of all prompts, read now if it was not. Raises as `read_haystack`."""
        return self.haystack

    @cached_property
    def _periods(self) -> frozenset[int]:
        return period_ids(self._tokenizer)

    def make(self, length: int, depth: float, sample: int) -> NeedlePrompt:
        """Prompt number `sample` of a cell. Raises UsageError when the length leaves no room for a haystack."""
        config, parts = self._config, self._parts(length, depth, sample)
        size = self._haystack_tokens(length, parts)
        hay = self.haystack.ids[:size]
        depths = [depth + i * (1 - depth) / config.needles for i in range(config.needles)]
        places = [0 if d == 0 else self._after_period(hay, int(size * d)) for d in depths]
        places += [self._after_period(hay, parts.rng.randrange(size)) for _ in range(config.distractors)]
        numbers = tuple(parts.numbers[i] for i in parts.asked)
        return NeedlePrompt(
            ids=self._prefix + _inserted(hay, parts.needles, places) + parts.question,
            cities=tuple(CITIES[i] for i in parts.asked),
            numbers=numbers,
            answer=answer_ids(self._tokenizer, numbers[0]) if len(numbers) == 1 else [],
            places=tuple(places),
        )

    def needed(self, length: int) -> int:
        """Tokens of context that the prompts of a length take at most, their answers included. Raises as `make`."""
        cells = [(depth, sample) for depth in self._config.depths for sample in range(self._config.samples)]
        parts = [self._parts(length, *cell) for cell in cells]
        return max(self._haystack_tokens(length, each) + self._others(each) for each in parts)

    def _parts(self, length: int, depth: float, sample: int) -> _Parts:
        config, encode = self._config, self._tokenizer.encode
        rng = random.Random(f"{config.seed}/{length}/{depth!r}/{sample}")
        numbers = _different(rng, config.needles + config.distractors, 10**config.digits)
        needles = [encode(needle_text(city, n)) for city, n in zip(CITIES, numbers, strict=False)]
        asked = sorted(rng.sample(range(config.needles), config.asked))
        return _Parts(rng, numbers, asked, needles, question_ids(self._tokenizer, [CITIES[i] for i in asked]))

    def _others(self, parts: _Parts) -> int:
        return len(self._prefix) + sum(map(len, parts.needles)) + len(parts.question) + self.room

    def _haystack_tokens(self, length: int, parts: _Parts) -> int:
        if self._config.length_of == "haystack":
            return length
        others = self._others(parts)
        if length <= others:
            raise UsageError(
                "a length leaves no room for a haystack", value=length, allowed=f"more than {others} tokens"
            )
        return length - others

    def _after_period(self, hay: Sequence[int], start: int) -> int:
        """The place after the next full stop at or after `start`; `start` itself where there is none."""
        return next((i + 1 for i in range(start, len(hay)) if hay[i] in self._periods), start)


def _different(rng: random.Random, count: int, below: int) -> list[int]:
    numbers: dict[int, None] = {}
    while len(numbers) < count:
        numbers[rng.randrange(below)] = None
    return list(numbers)


def _inserted(hay: Sequence[int], needles: Sequence[list[int]], places: Sequence[int]) -> list[int]:
    """The haystack with each needle at its place; at one place, in their order."""
    ids: list[int] = []
    done = 0
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: pair[0]):
        ids += hay[done:place]
        ids += needle
        done = place
    ids += hay[done:]
    return ids
