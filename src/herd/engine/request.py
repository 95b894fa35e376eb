"""What goes into the engine and what comes out: sampling options, completions, stream chunks, scores.

These are plain frozen data classes, so that every backend, the server and the stages that generate data share them.
Numbers from outside are checked here once, with finite bounds; the scheduler and the sampler trust them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict

import numpy as np

from herd.engine.grammar import Grammar
from herd.errors import UsageError

FinishReason = Literal["stop", "length", "cancelled"]

DEFAULT_MAX_TOKENS = 256


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments of `LLM.generate`, `stream` and `chat`; meanings and bounds stand at `Sampling`."""

    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    skip_specials: bool
    logprobs: bool | None
    top_logprobs: int
    prompt_logprobs: bool
    adapter: str | None
    grammar: Grammar | None


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a completion ends.

    Defaults are the reference implementation's: temperature 0.6, top_p 0.9 (facts: Llama 3 reference code).
    The order of the steps is: penalties, logit bias, grammar, temperature, typical_p, top_k, top_p, min_p, draw.
    """

    max_tokens: int | None = None
    """Tokens to generate at most. None: 256, or what the context leaves when that is less. A number must fit."""
    temperature: float = 0.6
    """0 is greedy: always the most likely token."""
    top_p: float = 0.9
    """Keep the most likely tokens as long as the mass before a token is not above this (1: all)."""
    top_k: int = 0
    """Keep this many most likely tokens (0: all)."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one (0: all)."""
    typical_p: float = 1.0
    """Keep the tokens whose surprise is nearest to the expected one, up to this mass (1: all; arXiv 2202.00666)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or answer (CTRL, arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it was generated."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids; -100 forbids a token in practice."""
    seed: int | None = None
    """Token i of a request with seed s uses the same random number in any batch. None: a fresh seed, reported."""
    stop: tuple[str, ...] = ()
    """End before the first of these strings appears in the text; it is not part of the text."""
    stop_token_ids: tuple[int, ...] = ()
    """Further token ids that end a completion, besides the tokenizer's own."""
    ignore_eos: bool = False
    """Go on past the tokenizer's stop tokens (for measurements)."""
    skip_specials: bool = False
    """Leave control tokens out of the text; otherwise they stand there by name (the stop token never does)."""
    logprobs: bool = False
    """Report the natural logarithm of each chosen token's probability under the model (before any option above)."""
    top_logprobs: int = 0
    """Report this many most likely tokens at each step as well; implies `logprobs`."""
    prompt_logprobs: bool = False
    """Report how likely each token of the prompt was, too. Then all of it is computed, remembered or not."""
    adapter: str | None = None
    """Name of a low-rank adapter that `LLM.load_adapter` has loaded; requests with different ones share a batch."""
    grammar: Grammar | None = None
    """What the answer must be, e.g. `Grammar.json_schema({…})`: tokens that cannot lead to it are not chosen.

    Stop tokens come where it is complete, and only they come when nothing else can: so `ignore_eos` is refused.
    `max_tokens` may cut an answer ("length"); one that is complete with its last token has "stop". A `stop` string or
    a token of `stop_token_ids` that the grammar allows inside an answer ends it early.
    """

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Sampling:
        """Check keyword arguments and build the value. Raises UsageError with the nearest name or the bounds."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                fix = f"did you mean {near[0]}?" if near else None
                raise UsageError(
                    "unknown sampling option",
                    value=name,
                    allowed=", ".join(known),
                    fix="only generate and chat take n" if name == "n" else fix,
                )
        values = {name: _python(value) for name, value in options.items()}
        values["stop"] = _stop_strings(values.get("stop"))
        ids = values.get("stop_token_ids")
        values["stop_token_ids"] = () if ids is None else _token_ids("stop_token_ids", ids)
        if values.get("logit_bias") is not None:
            values["logit_bias"] = _logit_bias(values["logit_bias"])
        for switch in ("logprobs", "prompt_logprobs", "ignore_eos", "skip_specials"):
            values[switch] = _switch(switch, values.get(switch))
        sampling = cls(**values)
        sampling._check()
        return sampling

    def _check(self) -> None:
        if self.max_tokens is not None:
            check_whole("max_tokens", self.max_tokens, 1, 1 << 30)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        check_whole("top_k", self.top_k, 0, 1 << 30)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("typical_p", self.typical_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _number("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        if self.seed is not None:
            check_whole("seed", self.seed, 0, (1 << 63) - 1)
        check_whole("top_logprobs", self.top_logprobs, 0, 20)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            allowed = "Grammar.json_schema(…), .regex(…), .lark(…), .choice(…)"
            raise UsageError("grammar is no Grammar", value=type(self.grammar).__name__, allowed=allowed)
        if self.grammar is not None and self.ignore_eos:
            raise UsageError("an answer that follows a grammar ends with it", fix="leave ignore_eos out, or grammar")

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs or self.top_logprobs > 0


@dataclass(frozen=True)
class Usage:
    """Token counts of one completion. A stop token counts as a completion token."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds a completion spent: waiting for a place, in its prompt, generating. Other sequences shared that time."""

    queue_s: float
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    """Prompt tokens per second, of this sequence alone."""
    decode_tokens_per_s: float
    """Generated tokens after the first per second, of this sequence alone."""
    reused_tokens: int = 0
    """Prompt tokens that were in the cache already, of an earlier prompt or of a sibling."""
    drafted_tokens: int = 0
    """Tokens guessed by speculation."""
    accepted_tokens: int = 0
    """Guesses that were right, each of which saved a step."""


@dataclass(frozen=True)
class Completion:
    """One finished answer.

    `token_ids` are all generated ids, the stop token included, so that training on them sees the end; `text` is
    without stop token and stop string. `logprobs` and `top_logprobs` run parallel to `token_ids`.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int
    """The seed that was used; with it (and the same options) the completion can be repeated."""
    top_logprobs: list[list[tuple[int, float]]] | None = None
    """For each generated token, the most likely (token id, logprob) pairs, best first."""
    stop: str | int | None = None
    """The stop string or stop token id that ended it; None at "length", or where its grammar was complete by then."""
    prompt_logprobs: list[float] | None = None
    """With `Sampling.prompt_logprobs`, of the prompt's tokens from the second on: the first has nothing before it."""
    prompt_top_logprobs: list[list[tuple[int, float]]] | None = None
    """The same as `top_logprobs`, for these tokens."""


@dataclass(frozen=True)
class Chunk:
    """One generated token of a stream. `text` may be empty: half a character, or what could begin a stop string."""

    text: str
    token_id: int
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    completion: Completion | None = None
    """The whole answer, on the last chunk."""
    top_logprobs: list[tuple[int, float]] | None = None
    """The most likely (token id, logprob) pairs in its place, best first, where they were asked for."""


@dataclass(frozen=True)
class Score:
    """How likely the model finds a text: `logprobs[i]` is ln P(token_ids[i] | everything before it).

    The first token of the input (BOS for a text) is given, not predicted, and is not in `token_ids`.
    """

    token_ids: list[int]
    logprobs: list[float] = field(repr=False)
    n_bytes: int
    """UTF-8 bytes of the scored text."""

    @property
    def total_logprob(self) -> float:
        return math.fsum(self.logprobs)

    @property
    def bits_per_byte(self) -> float:
        """-sum ln P / (ln 2 * bytes)."""
        if not self.n_bytes:
            raise UsageError("bits per byte of an empty text", fix="leave empty texts out")
        return -self.total_logprob / (math.log(2.0) * self.n_bytes)


def _python(value: Any) -> Any:
    """A number or truth value of numpy's as Python's own; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _switch(name: str, value: object) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    fix = "for several tokens per step use top_logprobs=N" if name == "logprobs" else None
    raise UsageError(f"{name} is a switch", value=_quoted(value), allowed="True or False", fix=fix)


def _number(name: str, value: object, low: float, high: float) -> float:
    value = _python(value)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UsageError(f"{name} is no number", value=_quoted(value), allowed=f"{low:g} to {high:g}")
    if not low <= value <= high:
        raise UsageError(f"{name} is out of range", value=value, allowed=f"{low:g} to {high:g}")
    return float(value)


def check_whole(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int, Python's or numpy's; UsageError unless it is one from `low` to `high`."""
    value = _python(value)
    allowed = f"a whole number from {low} to {high}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name} is no whole number", value=_quoted(value), allowed=allowed)
    if not low <= value <= high:
        raise UsageError(f"{name} is out of range", value=value, allowed=allowed)
    return value


def _quoted(value: object) -> object:
    """A text with its quotes, so that "5" is not mistaken for 5."""
    return repr(value) if isinstance(value, str) else value


def _stop_strings(value: object) -> tuple[str, ...]:
    strings = () if value is None else (value,) if isinstance(value, str) else tuple(_iterate("stop", value))
    if len(strings) > 16 or not all(isinstance(s, str) and 0 < len(s) <= 256 for s in strings):
        raise UsageError("stop is not usable", value=value, allowed="up to 16 strings of 1 to 256 characters")
    return strings


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    what = f"a token id in {name}"
    return tuple(check_whole(what, token_id, 0, (1 << 31) - 1) for token_id in _iterate(name, value))


def _logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise UsageError("logit_bias is not a mapping", value=value, allowed="{token id: number}")
    biases = [_number("a bias in logit_bias", bias, -100.0, 100.0) for bias in value.values()]
    return dict(zip(_token_ids("logit_bias", value), biases, strict=True))


def _iterate(name: str, value: object) -> Iterable[Any]:
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise UsageError(f"{name} is not a list", value=value)
    return value
