"""Continuous batching: sequences join and leave the running batch at any step, so no answer waits for a longer one.

One step is: let waiting sequences in while there is room, append to every running sequence what the backend does not
have of it yet (a piece of its prompt, or the token chosen last) in one ragged call, choose a token for each sequence
that is complete there, and let finished sequences go. Long prompts enter in pieces, so that running answers keep
moving. Masks of grammars take a small part of each step: an answer whose mask is not there yet keeps its logits, and
chooses in a later step. When room runs out, the sequence that came last goes back to the queue with all its tokens, and
is computed again later. With a drafter, guesses at the next tokens are computed along, and those that turn out to be
what is chosen save a step each.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from herd.engine.backend import Backend, Span
from herd.engine.constraint import Constraint, GrammarFailed, Grammars
from herd.engine.live_sequence import LiveSequence
from herd.engine.mask_turns import MaskTurns
from herd.engine.request import Chunk, Sampling
from herd.engine.sampler import BrokenLogits, SamplerRow, sample, with_logprobs
from herd.engine.speculation import MAX_DRAFT, Ask, Drafter
from herd.engine.text import StreamDecoder, TextStream

PREFILL_TOKENS = 1024
"""Prompt tokens that enter in one step, over all sequences, where nobody asks for shorter steps."""
LOGIT_ROWS = 256
"""Rows of logits in one step: beyond one for each sequence, guesses are made only up to here."""
_COMPILED_AHEAD = 64  # grammars of sequences that wait: what is compiled of one takes memory
_PATIENCE_S = 0.02  # for a grammar, when there is nothing else to do


class _Work:
    """A sequence's part of a step: the tokens to append, guesses after them, and the first of its rows of logits."""

    logits_NV: npt.NDArray[np.float32]
    """Those of the step."""

    def __init__(self, sequence: LiveSequence, tokens: Sequence[int], draft: list[int]) -> None:
        self.sequence = sequence
        self.draft = draft
        self.n_drafted = len(draft)
        self.row = 0
        self.scored = len(tokens) if sequence.scoring else 0
        outputs = self.scored or (1 + len(draft) if sequence.computed else 0)
        self.span = Span(sequence.handle or 0, [*tokens, *draft], outputs)

    @property
    def logits_V(self) -> npt.NDArray[np.float32]:
        """Of which a token is chosen next."""
        held_V = self.sequence.held_V
        return self.logits_NV[self.row] if held_V is None else held_V

    def score(self) -> None:
        """Note how likely the prompt's tokens after those of this step were; the row after them is what remains."""
        sequence = self.sequence
        first = len(sequence.given) + 1
        known = sequence.prompt[first : first + self.scored]
        for i, token_id in enumerate(known):
            sequence.given.append(with_logprobs(self.logits_NV[self.row + i], token_id, sequence.sampling.top_logprobs))
        self.row += len(known)


def _gathered(works: Sequence[_Work]) -> npt.NDArray[np.float32]:
    """Their logits, of those that are all of a step without another copy."""
    if all(work.sequence.held_V is None for work in works):
        logits_NV = works[0].logits_NV
        if [work.row for work in works] == list(range(len(logits_NV))):
            return logits_NV
    return np.stack([work.logits_V for work in works])


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
        self._masks = MaskTurns()
        self.most_running: int | None = None
        """So many sequences go on together at most, also where there is room for more; None: any number."""
        self.prefill_tokens = PREFILL_TOKENS
        self.tokens = 0
        """Tokens that were computed so far, of prompts and answers."""
        self.preemptions = 0
        """How often a running sequence gave up its place so far."""

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
        salt: str = "",
    ) -> LiveSequence:
        """Queue a completion of `prompt` (not empty; prompt + max_tokens fit in the context)."""
        stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._stop_ids)
        constraint = None
        if sampling.grammar is not None:
            assert self._grammars is not None
            beside = None if leader is None else leader.row.constraint
            constraint = Constraint(self._grammars, sampling.grammar, stop_ids, beside)
        sequence = LiveSequence(
            prompt=prompt,
            sampling=sampling,
            max_tokens=max_tokens,
            row=SamplerRow(sampling, seed, prompt, constraint),
            text=TextStream(decoder, sampling.stop),
            stop_ids=stop_ids,
            on_chunk=on_chunk,
            leader=leader,
            salt=salt,
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
            if leader is not None and leader.handle is not None and not leader.choices and leader.held_V is None:
                return  # its prompt is being computed by its leader: it forks when that is done
            remembered = [] if sequence.scoring else sequence.tokens
            reserved = self._backend.reserve(sequence.capacity, remembered, sequence.sampling.adapter, sequence.salt)
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
        sequence.handle = sequence.held_V = None

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
        held = [_Work(s, [], []) for s in self._running if s.held_V is not None]
        if not works and not held:
            compiling = next((s.row.constraint for s in self._preparing), None)
            if compiling is not None:
                compiling.wait(_PATIENCE_S)
            return
        self._masks.begin(alone=not works)
        if works:
            works = self._compute(works)
        self._choose(works + held)

    def _compute(self, works: list[_Work]) -> list[_Work]:
        """Append all spans; the works, and those of followers, that have the logits after their last token then."""
        logits_NV = self._backend.step([work.span for work in works])
        self.tokens += sum(len(work.span.tokens) for work in works)
        if logits_NV.shape[1] > self._vocabulary:
            logits_NV[:, self._vocabulary :] = -np.inf
        row = 0
        for work in works:
            work.logits_NV, work.row = logits_NV, row
            row += work.span.outputs
            if work.scored:
                work.score()
        works = [work for work in works if work.sequence.computed]
        for leader in [work for work in works if not work.sequence.choices]:
            for follower in self._fork_followers(leader.sequence):
                works.append(_Work(follower, [], []))
                works[-1].logits_NV, works[-1].row = logits_NV, leader.row
        return works

    def _choose(self, works: list[_Work]) -> None:
        """Choose a token for each, and further ones as long as the choices are what was guessed.

        Those whose masks are not there yet keep their logits until then, and what was guessed of them is given up.
        """
        active = works
        while active := self._with_masks(active):
            logits_BV = _gathered(active)
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
                work.sequence.held_V = None
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

    def _with_masks(self, works: list[_Work]) -> list[_Work]:
        """Those that can choose now."""
        asking = [c for work in works if (c := work.sequence.row.constraint) is not None]
        late = self._masks.late(asking) if asking else []
        if not late:
            return works
        for work in works:
            if work.sequence.row.constraint in late and work.sequence.held_V is None:
                work.sequence.held_V = work.logits_V.copy()
        return [work for work in works if work.sequence.row.constraint not in late]

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
        self.preemptions += 1
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
