"""Which needles a recipe's model is asked for, and the phases of a run that are judged by them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from herd.config import Config
from herd.corpus import STDLIB
from herd.errors import UsageError
from herd.evaluate.needle import NeedleConfig, PromptMaker, even_depths
from herd.pretrain.config import Criteria, PretrainConfig

if TYPE_CHECKING:
    from herd.pretrain.promoting import Promote
    from herd.tokenizer import Tokenizer


class NeedleGrid(Config):
    """Numbers hidden in a text: how many, how deep, in what."""

    lengths: int = Field(
        default=1,
        ge=1,
        le=100,
        description="lengths of the texts, evenly up to the new one; several: extend asks the model before, too",
    )
    depths: int = Field(default=11, ge=2, le=1000, description="depths at which needles lie, from start to end")
    samples: int = Field(default=2, ge=1, le=1000, description="needles at each length and depth")
    digits: int = Field(default=7, ge=1, le=18, description="digits of their numbers")
    haystack: tuple[str, ...] = Field(
        default=(STDLIB,), min_length=1, description="text to hide them in: files, *.jsonl, folders, python-stdlib"
    )

    def grid(self, context: int) -> NeedleConfig:
        """The needle grid of a model with this context."""
        return self.at(*(context * number // self.lengths for number in range(1, self.lengths + 1)))

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
        description="tokens of the windows that short text is read in, at most init_from's context; null:"
        " train.seq_len, or that context where it is less",
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
            maker = PromptMaker(words, self.at(config.longest_row))
            for phase in config.sizes():
                try:
                    maker.needed(phase.seq_len // self.lengths)
                except UsageError as error:
                    fix = "base.promote.needles=0, longer rows, or fewer lengths or digits"
                    raise UsageError(
                        f"promote: {error.what}", value=error.value, allowed=error.allowed, fix=fix
                    ) from None
            maker.read()
        asked = Criteria(tolerance=self.tolerance, needles=self.needles)
        return Promote(asked, hidden, self.short, self.lengths, self.depths * self.samples)
