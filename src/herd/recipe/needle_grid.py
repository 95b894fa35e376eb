"""Which needles a recipe's model is asked for, and the phases of a run that are judged by them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from herd.config import Config
from herd.corpus import STDLIB
from herd.evaluate.needle import NeedleConfig, PromptMaker, even_depths
from herd.pretrain.config import Criteria, PretrainConfig

if TYPE_CHECKING:
    from herd.pretrain.promoting import Promote
    from herd.tokenizer import Tokenizer


class NeedleGrid(Config):
    """Numbers hidden in a text: how many, how deep, in what."""

    depths: int = Field(default=11, ge=2, le=1000, description="depths at which needles lie, from start to end")
    samples: int = Field(default=2, ge=1, le=1000, description="needles at each length and depth")
    digits: int = Field(default=7, ge=1, le=18, description="digits of their numbers")
    haystack: tuple[str, ...] = Field(
        default=(STDLIB,), min_length=1, description="text to hide them in: files, *.jsonl, folders, python-stdlib"
    )

    def at(self, *lengths: int) -> NeedleConfig:
        """The needle grid at these lengths."""
        return NeedleConfig(
            lengths=lengths,
            depths=even_depths(self.depths),
            samples=self.samples,
            digits=self.digits,
            haystack=self.haystack,
        )


class PromoteConfig(Criteria, NeedleGrid):
    """What must hold where a phase of pretraining ends."""

    short: int | None = Field(
        default=None,
        ge=1,
        le=2**32,
        description="tokens of the windows that short text is read in; null: as of a first row",
    )

    def promote(self, words: Tokenizer, config: PretrainConfig) -> Promote:
        """The criteria with their prompts. Raises UsageError where there is no haystack, or no room for it in the rows
        of a phase, before one is trained."""
        from herd.pretrain.promoting import Promote

        def hidden(length: int) -> Iterator[tuple[list[int], list[int]]]:
            grid = self.at(length)
            maker = PromptMaker(words, grid)
            for depth in grid.depths:
                for sample in range(grid.samples):
                    prompt = maker.make(length, depth, sample)
                    yield prompt.ids, prompt.answer

        if self.needles:
            maker = PromptMaker(words, self.at(*(phase.seq_len for phase in config.sizes())))
            for phase in config.sizes():
                maker.needed(phase.seq_len)
            assert maker.haystack  # read, or said not to be there
        return Promote(Criteria(tolerance=self.tolerance, needles=self.needles), hidden, self.short)
