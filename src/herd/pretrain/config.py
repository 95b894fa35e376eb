"""What a pretraining stage can be told, besides the model's shape. Needs no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, Protocol

from pydantic import Field, model_validator

from herd.architecture import LlamaConfig
from herd.config import Config
from herd.errors import UsageError
from herd.pretrain.phases import Phases
from herd.train.config import TrainConfig

WHOLE = "train"
"""The name of the one source where none are configured: all of the corpus's training text."""

Weight = Annotated[float, Field(ge=0, le=1e9)]


class Source(Config):
    """One source of a mixture: a part of the stage's corpus, or token shards made earlier."""

    weight: Weight = Field(description="share of the rows, relative to the other sources' weights")
    match: tuple[str, ...] = Field(
        default=(), description="the corpus's documents whose url is like one of these, as in python-stdlib/json/*"
    )
    kind: Literal["code", "prose"] | None = Field(default=None, description="the corpus's documents of this kind")
    shards: tuple[str, ...] = Field(
        default=(), description="directories of token shards, instead of documents of the corpus"
    )
    infilling: float = Field(
        default=0.0, ge=0, le=1, description="share of its documents cut into prefix, suffix and middle (Code Llama)"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if self.shards and (self.match or self.kind or self.infilling):
            raise ValueError("shards are tokens already: they have no match, kind or infilling")
        return self


class Mix(Config):
    """Other weights from a point on."""

    from_tokens: int = Field(ge=1, le=10**18, description="the first row that has so many tokens before it")
    weights: dict[str, Weight] = Field(description="source → weight; sources not named give no more rows")


class Size(Config):
    """Rows and steps of another size from a point on."""

    from_tokens: int = Field(ge=1, le=10**18, description="the first step that has so many tokens before it")
    seq_len: int = Field(ge=1, le=2**32, description="tokens of a row")
    batch_size: int = Field(ge=1, le=2**32, description="rows of an optimiser step")


class Annealing(Config):
    """What the last `train.anneal` steps do, beside a learning rate that falls linearly to 0."""

    weights: dict[str, Weight] = Field(
        default_factory=dict, description="source → weight in these steps; none: as before them"
    )
    average: bool = Field(default=True, description="end with the mean of the weights after each of these steps")


class Criteria(Config):
    """What a model must be after a training that lengthened its context."""

    tolerance: float | None = Field(
        default=0.02,
        ge=0,
        le=1,
        description="bits per byte of short text may rise by this share; more ends it; null: as they like",
    )
    needles: float = Field(
        default=1.0, ge=0, le=1, description="share of the needles to find at the new length; 0: none are asked for"
    )


class PretrainConfig(Config):
    """Data, time and evaluation of a pretraining stage; `train` has the knobs of the loop."""

    seed: int = Field(
        default=0, ge=0, lt=2**31, description="of the initial weights, the order of the data and the loop"
    )
    init_from: str | None = Field(
        default=None, min_length=1, description="a checkpoint whose weights to begin with; null: new ones"
    )
    packing: Literal["concat", "best_fit"] = Field(
        default="concat",
        description="concat: documents end to end, cut where a row ends; best_fit: cut only if longer than a row",
    )
    infilling: float = Field(
        default=0.0, ge=0, le=1, description="share of documents cut into prefix, suffix and middle; without sources"
    )
    sources: dict[str, Source] = Field(
        default_factory=dict,
        description="name → {weight, and match, kind or shards}: a mixture; a document is of the first source that it"
        " fits; none: the whole corpus",
    )
    mix: tuple[Mix, ...] = Field(
        default=(), description="later weights of the sources: {from_tokens, weights}, in order"
    )
    phases: tuple[Size, ...] = Field(
        default=(),
        description="later sizes of rows and steps: {from_tokens, seq_len, batch_size}, in order; train has the first",
    )
    anneal: Annealing = Field(default_factory=Annealing, description="the last train.anneal steps")
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        description="time for the whole stage: steps are lowered to what this machine can do in it",
    )
    evaluations: int = Field(
        default=8, ge=0, description="times the held-out probe is scored along the way, at equal distances"
    )
    probe_tokens: int = Field(default=32_768, ge=1, description="about so many held-out tokens are in the probe")
    export_every: int = Field(
        default=0, ge=0, description="steps between copies of the weights as checkpoints in exports/, all kept; 0: none"
    )
    save_dtype: Literal["f32", "bf16"] = Field(default="f32", description="number format of the saved checkpoint")
    train: TrainConfig = Field(default_factory=TrainConfig, description="the training loop")

    @model_validator(mode="after")
    def _fits(self) -> PretrainConfig:
        _in_order("phases", self.phases)
        _in_order("mix", self.mix)
        self._lengths_fit()
        self._sources_fit()
        self._anneal_fits()
        return self

    @property
    def parts(self) -> dict[str, Source]:
        """The sources, also where none are configured."""
        return self.sources or {WHOLE: Source(weight=1, infilling=self.infilling)}

    def sizes(self) -> Phases:
        """The run's phases in steps, rows and tokens."""
        return Phases(self.train.seq_len, self.train.batch_size, self.phases)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest rows of all phases."""
        return max([self.train.seq_len, *(phase.seq_len for phase in self.phases)])

    def check_layout(self, shape: LlamaConfig, ranks: int, short_row: int | None = None) -> None:
        """Raises UsageError for a phase whose rows so many ranks cannot share, and for rows of short text that they
        cannot."""
        train, phases = self.train, self.sizes()
        if not train.parallel.needs_mesh:
            return
        tokens = train.micro_batch_rows * train.seq_len
        for phase in phases:
            train.parallel.check(shape, phase.seq_len, phase.batch_size, phase.micro_batch(tokens), ranks)
        if short_row is not None:
            first = phases[0]
            try:
                train.parallel.check(shape, short_row, first.batch_size, first.micro_batch(tokens), ranks)
            except UsageError as error:
                raise error.inside("promote: rows of short text") from None

    def why_not_judged(self) -> str | None:
        """Why its phases cannot be judged where they end; None where they can."""
        if self.init_from is None:
            return "it asks for what init_from's checkpoint could, and there is none"
        if self.max_minutes is not None:
            return "phases that are judged end at known steps, so max_minutes cannot decide them"
        last, end = self.sizes()[-1].first_step, self.train.steps - self.train.anneal
        if last >= end:
            return f"the last phase would begin after step {last}, and annealing, or the end, comes after step {end}"
        return None

    def _lengths_fit(self) -> None:
        for length in [self.train.seq_len, *(phase.seq_len for phase in self.phases)]:
            if self.longest_row % length:
                raise ValueError(f"seq_len {length} does not divide the longest row, {self.longest_row} tokens")

    def _sources_fit(self) -> None:
        if not self.sources:
            if self.mix or self.anneal.weights:
                raise ValueError("weights need sources, and there are none")
            return
        if self.infilling:
            raise ValueError("with sources, infilling is said of each of them: sources.NAME.infilling")
        for name in self.sources:
            if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
                raise ValueError(f"source {name!r} is not named by letters, digits, - and _")
        _weights_fit("sources", {name: source.weight for name, source in self.sources.items()}, self.sources)
        for number, change in enumerate(self.mix):
            _weights_fit(f"mix.{number}.weights", change.weights, self.sources)
        if self.anneal.weights:
            _weights_fit("anneal.weights", self.anneal.weights, self.sources)

    def _anneal_fits(self) -> None:
        steps = self.train.anneal
        if self.anneal.weights and not steps:
            raise ValueError("anneal.weights are for the last train.anneal steps, and there are none")
        if steps and self.max_minutes is not None:
            raise ValueError("annealing begins at a known step, so max_minutes cannot decide how many there are")
        if self.train.schedule_steps is not None and self.max_minutes is not None:
            raise ValueError("schedule_steps is of a run whose steps are known, so max_minutes cannot decide them")
        if self.phases and self.max_minutes is not None:
            raise ValueError("steps of changing size cannot be planned by max_minutes: give train.steps alone")
        if steps and self.anneal.average and self.train.average != "none":
            raise ValueError(f"anneal.average and train.average={self.train.average} are two averages: switch one off")
        begins = self.sizes().rows_before(self.train.steps - steps)
        late = [change.from_tokens for change in self.mix if self.sizes().row_at(change.from_tokens) >= begins]
        if self.anneal.weights and late:
            raise ValueError(f"mix changes at {late[0]} tokens, when anneal.weights hold already")


class _FromTokens(Protocol):
    @property
    def from_tokens(self) -> int: ...


def _in_order(field: str, changes: Sequence[_FromTokens]) -> None:
    for number, (one, other) in enumerate(itertools.pairwise(changes)):
        if other.from_tokens <= one.from_tokens:
            raise ValueError(
                f"{field} must begin after one another, but {field}.{number} begins at {one.from_tokens} tokens and"
                f" {field}.{number + 1} at {other.from_tokens}"
            )


def _weights_fit(field: str, weights: Mapping[str, float], sources: Iterable[str]) -> None:
    known = list(sources)
    for name in weights:
        if name not in known:
            raise ValueError(f"{field} names {name!r}, which is no source; sources are {', '.join(known)}")
    if not any(weights.values()):
        raise ValueError(f"{field}: at least one weight must be above 0")
