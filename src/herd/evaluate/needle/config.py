"""What a needle grid asks, and the published grids by name."""

from __future__ import annotations

from typing import Any, Literal, Self

import pydantic

from herd.config import Config
from herd.corpus import STDLIB
from herd.evaluate.needle.wording import CITIES

LengthOf = Literal["total", "haystack"]


class NeedleConfig(Config):
    """A grid of lengths and depths. Each cell asks `samples` prompts, which hide `needles` numbers each."""

    lengths: tuple[pydantic.PositiveInt, ...] = pydantic.Field(
        min_length=1, max_length=1000, description="Lengths to test, in tokens."
    )
    length_of: LengthOf = pydantic.Field(
        default="total",
        description="What a length counts: total, prompt and answer; or haystack, that alone, as EasyContext does.",
    )
    depths: tuple[float, ...] = pydantic.Field(
        min_length=1, max_length=1000, description="Where the first needle lies, from 0, the start, to 1, the end."
    )
    samples: int = pydantic.Field(default=1, ge=1, le=1000, description="Prompts in each cell.")
    digits: int = pydantic.Field(default=7, ge=1, le=18, description="Numbers are drawn below 10 to the power of this.")
    needles: int = pydantic.Field(
        default=1, ge=1, le=len(CITIES), description="Numbers hidden in a prompt, evenly from the depth to the end."
    )
    ask: int | None = pydantic.Field(default=None, ge=1, description="How many of them are asked for; null: all.")
    distractors: int = pydantic.Field(
        default=0, ge=0, lt=len(CITIES), description="Further numbers at random places, never asked for."
    )
    haystack: tuple[str, ...] = pydantic.Field(
        default=(STDLIB,),
        min_length=1,
        description="Text to hide them in: text files, *.jsonl, folders, python-stdlib.",
    )
    generator_tokens: int | None = pydantic.Field(
        default=None, ge=1, description="The haystack repeats this many first tokens of its text; null: all of it."
    )
    seed: int = pydantic.Field(default=0, ge=0, description="Seed of the numbers and of random places.")

    @property
    def asked(self) -> int:
        """Numbers that a prompt asks for."""
        return self.needles if self.ask is None else self.ask

    @pydantic.field_validator("lengths")
    @classmethod
    def _ascending(cls, lengths: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(lengths)))

    @pydantic.field_validator("depths")
    @classmethod
    def _within(cls, depths: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= depth <= 1 for depth in depths):
            raise ValueError("numbers from 0 to 1")
        return tuple(sorted(set(depths)))

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        if self.asked > self.needles:
            raise ValueError(f"ask = {self.ask} is more than needles = {self.needles}")
        hidden = self.needles + self.distractors
        if hidden > len(CITIES):
            raise ValueError(f"needles + distractors = {hidden} is more than the {len(CITIES)} cities that name them")
        if hidden > 10**self.digits // 2:
            raise ValueError(f"{hidden} different numbers do not fit in digits = {self.digits}")
        return self


def even_depths(n: int) -> tuple[float, ...]:
    """n depths from 0 to 1, both included: 11 of them lie 0.1 apart."""
    return tuple(round(i / (n - 1), 6) for i in range(n))


def _gradient(interval: int, generator_tokens: int) -> dict[str, Any]:
    return {
        "lengths": tuple(range(100, 1_040_200 + 1, interval)),
        "length_of": "haystack",
        "depths": even_depths(6),
        "samples": 10,
        "digits": 8,
        "generator_tokens": generator_tokens,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "easycontext": {
        "lengths": tuple(range(1000, 100_000 + 1, 1000)),
        "length_of": "haystack",
        "depths": even_depths(11),
        "samples": 10,
        "digits": 7,
    },
    "gradient-1": _gradient(86_675, 25),
    "gradient-2": _gradient(173_350, 150_000),
    "gradient-3": _gradient(86_675, 925_000),
}
"""Published grids: EasyContext's defaults (eval_needle.py), and the three haystacks on the card of Gradient's Llama 3
with 4M tokens, which says lengths, depths, digits and tokens of the repeated text; samples are EasyContext's."""
