"""Continuous batching: sequences join and leave the running batch at any step, so no answer waits for a longer one.

One step is: let waiting sequences in while there is room, append to every running sequence what the backend does not
have of it yet (a piece of its prompt, or the token chosen last) in one ragged call, choose a token for each sequence
that is complete there, and let finished sequences go. Long prompts enter in pieces, so that running answers keep
moving. When room runs out, the sequence that came last goes back to the queue with all its tokens, and is computed
again later. With a drafter, guesses at the next tokens are computed along, and those that turn out to be what is chosen
save a step each.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from herd.engine.backend import Backend, Span
from herd.engine.constraint import Constraint, GrammarFailed, Grammars
from herd.engine.request import Chunk, Completion, FinishReason, Sampling, Timings, Usage
from herd.engine.sampler import BrokenLogits, Choice, SamplerRow, sample, with_logprobs
from herd.engine.speculation import MAX_DRAFT, Ask, Drafter
from herd.engine.text import StreamDecoder, TextStream

PREFILL_TOKENS = 1024
"""Prompt tokens that enter in one step, over all sequences, where nobody asks for shorter steps."""
LOGIT_ROWS = 256
"""Rows of logits in one step: beyond one for each sequence, guesses are made only up to here."""
_COMPILED_AHEAD = 64  # grammars of sequences that wait: what is compiled of one takes memory
_PATIENCE_S = 0.02  # for a grammar, when there is nothing else to do


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


class _Work:
    """A sequence's part of a step: the tokens to append, guesses after them, and the first of its rows of logits."""

    def __init__(self, sequence: LiveSequence, tokens: Sequence[int], draft: list[int], row: int = 0) -> None:
        self.sequence = sequence
        self.draft = draft
        self.n_drafted = len(draft)
        self.row = row
        self.scored = len(tokens) if sequence.scoring else 0
        outputs = self.scored or (1 + len(draft) if sequence.computed else 0)
        self.span = Span(sequence.handle or 0, [*tokens, *draft], outputs)

    def score(self, logits_NV: npt.NDArray[np.float32]) -> None:
        """Note how likely the prompt's tokens after those of this step were; the row after them is what remains."""
        sequence = self.sequence
        first = len(sequence.given) + 1
        known = sequence.prompt[first : first + self.scored]
        for i, token_id in enumerate(known):
            sequence.given.append(with_logprobs(logits_NV[self.row + i], token_id, sequence.sampling.top_logprobs))
        self.row += len(known)


class Scheduler:
    """Drives a backend over a queue of sequences. Not thread-safe: `LLM` holds the lock."""

    def __init__(
        self,
        backend: Backend,
        stop_ids: frozenset[int],
        vocabulary: int,
        drafter: Drafter | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """`vocabulary`: ids that have a text; rows of the head beyond it (padding) are never chosen.

        `grammars`: what compiles those of requests; without it there must be none.
        """
        self._backend = backend
        self._drafter = drafter
        self._vocabulary = vocabulary
        self._stop_ids = stop_ids
        self._grammars = grammars
        self._waiting: deque[LiveSequence] = deque()
        self._preparing: list[LiveSequence] = []  # those of them whose grammars are not compiled yet
        self._running: list[LiveSequence] = []
        self.most_running: int | None = None
        """So many sequences go on together at most, also where there is room for more; None: any number."""
        self.prefill_tokens = PREFILL_TOKENS
        self.tokens = 0
        """Tokens that were computed so far, of prompts and answers."""

    def add(
        self,
        prompt: list[int],
        sampling: Sampling,
        *,
        decoder: StreamDecoder,
        max_tokens: int,
        seed: int,
        leader: LiveSequence | None = None,
        on_chunk: Callable[[Chunk], None] | None = None,
    ) -> LiveSequence:
        """Queue a completion of `prompt` (not empty; prompt + max_tokens fit in the context)."""
        stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._stop_ids)
        constraint = None
        if sampling.grammar is not None:
            assert self._grammars is not None
            constraint = Constraint(self._grammars, sampling.grammar, stop_ids)
        sequence = LiveSequence(
            prompt=prompt,
            sampling=sampling,
            max_tokens=max_tokens,
            row=SamplerRow(sampling, seed, prompt, constraint),
            text=TextStream(decoder, sampling.stop),
            stop_ids=stop_ids,
            on_chunk=on_chunk,
            leader=leader,
            prepared=constraint is None,
        )
        self._waiting.append(sequence)
        if constraint is not None:
            self._preparing.append(sequence)
        return sequence

    @property
    def waiting(self) -> int:
        """Sequences that could begin if there were room."""
        return len(self._waiting) - len(self._preparing)

    @property
    def short_of_room(self) -> list[LiveSequence]:
        """Sequences that could begin, and do not for want of room; not those that wait for their leader's prompt."""
        return [s for s in self._waiting if s.prepared and (s.leader is None or s.leader.choices)]

    @property
    def preparing(self) -> int:
        """Requests whose first answer waits until its grammar is compiled."""
        return sum(sequence.leader is None for sequence in self._preparing)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def size(self) -> int:
        """All sequences, those that wait as well."""
        return len(self._running) + len(self._waiting)

    @property
    def _is_full(self) -> bool:
        return self.most_running is not None and len(self._running) >= self.most_running

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def uses_adapter(self, name: str) -> bool:
        return any(sequence.sampling.adapter == name for sequence in [*self._running, *self._waiting])

    def step(self) -> None:
        """Advance every sequence that has a place by one token or one piece of its prompt.

        When anything goes wrong, Ctrl-C included, all sequences end with that error and the cache is free again.
        """
        try:
            self.admit()
            self._advance()
        except BaseException as error:
            self.abort(error)
            raise

    def cancel(self, sequence: LiveSequence) -> None:
        """End a sequence now, keeping what it has; does nothing to one that has ended."""
        if sequence.completion is not None or sequence.error is not None:
            return
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            if not sequence.prepared:
                self._preparing.remove(sequence)
        else:
            self._leave(sequence)
        sequence.give_up()
        sequence.cut()

    def abort(self, error: BaseException) -> None:
        """End every sequence with `error` and free their room."""
        for sequence in [*self._running, *self._waiting]:
            sequence.error = error
            sequence.give_up()
        for sequence in [*self._running]:
            self._leave(sequence)
        self._waiting.clear()
        self._preparing.clear()

    def admit(self) -> None:
        """First come, first served; a sequence that must wait for room holds back those behind it, so none starves.

        One whose grammar is being compiled stands aside until that is done, and holds back nobody. No more enter than
        this step can take prompt tokens: a later one may find its beginning computed by then.
        """
        self._prepare()
        entering = sum(len(s.tokens) - s.n_computed for s in self._running if not s.choices)
        while entering < self.prefill_tokens and not self._is_full:
            sequence = next((s for s in self._waiting if s.prepared), None)
            if sequence is None:
                return
            leader = sequence.leader
            if leader is not None and leader.handle is not None and not leader.choices:
                return  # its prompt is being computed by its leader: it forks when that is done
            remembered = [] if sequence.scoring else sequence.tokens
            reserved = self._backend.reserve(sequence.capacity, remembered, sequence.sampling.adapter)
            if reserved is None:
                return
            handle, sequence.n_computed = reserved
            if not sequence.choices:
                sequence.n_reused = sequence.n_computed
            self._waiting.remove(sequence)
            self._enter(sequence, handle)
            entering += len(sequence.tokens) - sequence.n_computed

    def _prepare(self) -> None:
        """Have grammars compiled for sequences that wait, the first answer of each request before further ones."""
        if not self._preparing:
            return
        ahead = sum(s.row.constraint is not None for s in self._waiting) - len(self._preparing)
        in_turn = sorted(self._preparing, key=lambda s: s.leader is not None)
        for sequence in in_turn[: max(0, _COMPILED_AHEAD - ahead)]:
            assert sequence.row.constraint is not None
            sequence.prepared = sequence.row.constraint.prepare(later=sequence.leader is not None)
        self._preparing = [s for s in in_turn if not s.prepared]

    def _enter(self, sequence: LiveSequence, handle: int) -> None:
        sequence.handle = handle
        sequence.started = sequence.started or time.perf_counter()
        self._running.append(sequence)

    def _leave(self, sequence: LiveSequence) -> None:
        assert sequence.handle is not None
        self._running.remove(sequence)
        if self._drafter is not None:
            self._drafter.forget(sequence.handle)
        self._backend.release(sequence.handle)
        sequence.handle = None

    def _advance(self) -> None:
        works: list[_Work] = []
        budget = self.prefill_tokens
        rows = LOGIT_ROWS - len(self._running)  # of logits for tokens that are given
        drafts = self._drafts()
        for sequence in list(self._running):
            if sequence.handle is None:
                continue  # it gave its place to one before it
            tokens = sequence.tokens[sequence.n_computed :]
            if len(tokens) > 1:
                tokens = tokens[: min(budget, max(rows, 1)) if sequence.scoring else budget]
                budget -= len(tokens)
                rows -= len(tokens) if sequence.scoring else 0
            draft = drafts.get(id(sequence), [])
            if draft and not self._backend.grow(sequence.handle, len(tokens) + len(draft)):
                draft = []  # guesses are welcome, but nobody gives way to them
            if tokens and (draft or self._make_room(sequence, len(tokens))):
                sequence.n_computed += len(tokens)
                sequence.n_drafted += len(draft)
                works.append(_Work(sequence, tokens, draft))
        if not works:
            compiling = next((s.row.constraint for s in self._preparing), None)
            if compiling is not None:
                compiling.wait(_PATIENCE_S)
            return
        logits_NV = self._backend.step([work.span for work in works])
        self.tokens += sum(len(work.span.tokens) for work in works)
        if logits_NV.shape[1] > self._vocabulary:
            logits_NV[:, self._vocabulary :] = -np.inf
        row = 0
        for work in works:
            work.row = row
            row += work.span.outputs
            if work.scored:
                work.score(logits_NV)
        works = [work for work in works if work.sequence.computed]
        for leader in [work for work in works if not work.sequence.choices]:
            works += [_Work(follower, [], [], leader.row) for follower in self._fork_followers(leader.sequence)]
        self._choose(works, logits_NV)

    def _choose(self, works: list[_Work], logits_NV: npt.NDArray[np.float32]) -> None:
        """Choose a token for each, and further ones as long as the choices are what was guessed."""
        active = works
        while active:
            rows = [work.row for work in active]
            logits_BV = logits_NV if rows == list(range(len(logits_NV))) else logits_NV[rows]
            try:
                choices = sample(logits_BV, [work.sequence.row for work in active])
            except (BrokenLogits, GrammarFailed) as error:  # nothing was chosen yet: those rows end, the others go on
                for b in error.rows:
                    active[b].sequence.error = error
                    self._leave(active[b].sequence)
                active = [work for work in active if work.sequence.error is None]
                continue
            right = []
            for work, choice in zip(active, choices, strict=True):
                work.sequence.accept(choice)
                if work.draft and work.draft[0] == choice.token_id and work.sequence.completion is None:
                    work.sequence.n_computed += 1
                    work.sequence.n_accepted += 1
                    work.row, work.draft = work.row + 1, work.draft[1:]
                    right.append(work)
            active = right
        for work in works:
            sequence = work.sequence
            if sequence.error is not None:
                continue
            if sequence.completion is not None:
                self._leave(sequence)
            elif work.n_drafted:
                sequence.draft_size = min(MAX_DRAFT, work.n_drafted - len(work.draft) + 1)
                if work.draft:
                    assert sequence.handle is not None
                    self._backend.truncate(sequence.handle, sequence.n_computed)

    def _drafts(self) -> dict[int, list[int]]:
        """Guesses for the sequences that are generating, by the identity of the sequence."""
        if self._drafter is None:
            return {}
        asks, owners = [], []
        for sequence in self._running:
            room = sequence.capacity - len(sequence.tokens) - 1  # the last token is chosen, never guessed
            n = min(sequence.draft_size, room, LOGIT_ROWS // len(self._running) - 1)
            if sequence.choices and len(sequence.tokens) - sequence.n_computed == 1 and n > 0:
                assert sequence.handle is not None
                asks.append(Ask(sequence.handle, sequence.tokens, n))
                owners.append(id(sequence))
        return dict(zip(owners, self._drafter.propose(asks), strict=True)) if asks else {}

    def _make_room(self, sequence: LiveSequence, n_tokens: int) -> bool:
        """Room for more tokens of a running sequence; False when it had to give up its own place."""
        while sequence.handle is not None:
            if self._backend.grow(sequence.handle, n_tokens):
                return True
            self._put_back()
        return False

    def _put_back(self) -> None:
        """The sequence that came last gives up its place; it is first in the queue, with all its tokens."""
        last = self._running[-1]
        self._leave(last)
        last.n_computed = 0
        if not last.choices:
            last.given.clear()
        self._waiting.appendleft(last)

    def make_way(self) -> None:
        """All running sequences give up their places for now, so that something else may use the cache."""
        while self._running:
            self._put_back()

    def _fork_followers(self, leader: LiveSequence) -> list[LiveSequence]:
        """Let waiting sequences with the leader's prompt begin from its cache.

        Those that cannot begin yet, or have no room, compute it anew, or what the backend does not remember of it.
        """
        followers = []
        self._prepare()  # some may have become ready during the step
        for sequence in [s for s in self._waiting if s.leader is leader and s.prepared]:
            assert leader.handle is not None
            handle = None if self._is_full else self._backend.fork(leader.handle, sequence.capacity)
            if handle is None:
                break
            self._waiting.remove(sequence)
            self._enter(sequence, handle)
            sequence.n_computed = sequence.n_reused = len(sequence.prompt)
            followers.append(sequence)
        return followers
