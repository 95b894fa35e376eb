"""One answer on its way through the batch: what it has so far, and what it becomes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from herd.engine.request import Chunk, Completion, FinishReason, Sampling, Timings, Usage
from herd.engine.sampler import Choice, SamplerRow
from herd.engine.speculation import MAX_DRAFT
from herd.engine.text import TextStream


@dataclass(eq=False)
class LiveSequence:
    """One completion on its way. `max_tokens` is resolved: prompt and answer fit in the context."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    row: SamplerRow
    text: TextStream
    stop_ids: frozenset[int]
    on_chunk: Callable[[Chunk], None] | None = None
    leader: LiveSequence | None = None
    """Sequence with the same prompt to take the computed prompt from."""
    salt: str = ""
    """Its beginning is shared with others of the same salt only."""
    prepared: bool = True
    """It can begin: its grammar is compiled, if it has one."""

    handle: int | None = None
    n_computed: int = 0
    """Tokens the backend has."""
    n_reused: int = 0
    """Prompt tokens that did not have to be computed, because the backend remembered them."""
    n_drafted: int = 0
    n_accepted: int = 0
    draft_size: int = MAX_DRAFT
    """How many tokens to guess next: one more than were right last time."""
    choices: list[Choice] = field(default_factory=list)
    given: list[Choice] = field(default_factory=list)
    """The prompt's tokens from the second on as if they had been chosen, where that is asked for."""
    held_V: npt.NDArray[np.float32] | None = None
    """The logits after its last token, while it waits for what its grammar allows there."""
    completion: Completion | None = None
    error: BaseException | None = None
    """Why the sequence ended without a completion."""
    added: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    first_token: float = 0.0
    tokens: list[int] = field(init=False)
    """The prompt and what was chosen after it."""

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def capacity(self) -> int:
        return len(self.prompt) + self.max_tokens

    @property
    def computed(self) -> bool:
        """The backend has all tokens, and so the logits after the last one."""
        return self.n_computed == len(self.tokens)

    @property
    def scoring(self) -> bool:
        """How likely the tokens of its prompt are is still being found out."""
        return self.sampling.prompt_logprobs and not self.choices and self.leader is None

    def accept(self, choice: Choice) -> None:
        """Take the next token: extend the text, and complete when a stop or the length says so."""
        now = time.perf_counter()
        if not self.choices:
            self.first_token = now
        self.choices.append(choice)
        token_id = choice.token_id
        self.tokens.append(token_id)
        reason: FinishReason | None = None
        stop: str | int | None = None
        if token_id in self.stop_ids:
            reason, stop, text = "stop", token_id, self.text.finish()
        else:
            text = self.text.push(token_id)
            if self.text.matched_stop is None and len(self.choices) == self.max_tokens:
                reason = "stop" if self.row.constraint is not None and self.row.constraint.complete else "length"
                text += self.text.finish()
        if self.text.matched_stop is not None:
            reason, stop = "stop", self.text.matched_stop
        if reason is not None:
            self.completion = self._complete(reason, stop, now)
        if self.on_chunk is not None:
            self.on_chunk(Chunk(text, token_id, reason, choice.logprob, self.completion, choice.top_logprobs))

    def give_up(self) -> None:
        """It is not wanted any more: its grammar need not be compiled."""
        if self.row.constraint is not None:
            self.row.constraint.give_up()

    def cut(self) -> None:
        """Complete with what there is, because the caller wants no more."""
        self.text.finish()
        self.completion = self._complete("cancelled", None, time.perf_counter())

    def _complete(self, reason: FinishReason, stop: str | int | None, now: float) -> Completion:
        wants = self.sampling.wants_logprobs
        return Completion(
            text=self.text.text,
            token_ids=[choice.token_id for choice in self.choices],
            logprobs=[choice.logprob for choice in self.choices if choice.logprob is not None] if wants else None,
            finish_reason=reason,
            usage=Usage(len(self.prompt), len(self.choices)),
            timings=self._timings(now),
            seed=self.row.seed,
            top_logprobs=[choice.top_logprobs or [] for choice in self.choices] if self.sampling.top_logprobs else None,
            stop=stop,
            **self._of_prompt(),
        )

    def _of_prompt(self) -> dict[str, Any]:
        if not self.sampling.prompt_logprobs:
            return {}
        given = self.given if self.leader is None else self.leader.given
        found: dict[str, Any] = {"prompt_logprobs": [choice.logprob for choice in given]}
        if self.sampling.top_logprobs:
            found["prompt_top_logprobs"] = [choice.top_logprobs for choice in given]
        return found

    def _timings(self, now: float) -> Timings:
        started = self.started or now
        first = self.first_token or now
        prefill, decode = first - started, now - first
        return Timings(
            queue_s=started - self.added,
            prefill_s=prefill,
            decode_s=decode,
            prefill_tokens_per_s=(len(self.prompt) - self.n_reused) / prefill if prefill > 0 else 0.0,
            decode_tokens_per_s=(len(self.choices) - 1) / decode if decode > 0 else 0.0,
            reused_tokens=self.n_reused,
            drafted_tokens=self.n_drafted,
            accepted_tokens=self.n_accepted,
        )
