"""The native backend: Herd's compiled engine behind the engine's protocol. It needs no torch.

All arithmetic is in C++ (native/), one call per step; which sequence owns which page of the cache is decided here and
in paged_cache.py. Letters: T rows of a step, V vocabulary, D model width, K head width.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from herd import _native
from herd.architecture import LlamaConfig, attention_scale, rope_frequencies
from herd.checkpoint import open_checkpoint
from herd.checkpoint.mixes import activations_of
from herd.engine.backend import BackendOptions, CacheFull, Span, begun, context_of, thread_count
from herd.engine.memory import require_memory
from herd.engine.native_weights import Need, load_weights, make_engine, plan_native, smaller_plans, weight_formats
from herd.engine.paged_cache import CachedSequence, PagedCache
from herd.engine.scheduler import LOGIT_ROWS
from herd.errors import ContextLengthExceeded, HerdError

if TYPE_CHECKING:
    from herd.checkpoint import Adapter

MAX_SEQUENCES = 256
ROWS = 512
"""Rows of one native call at most; longer steps are cut. It bounds the working memory and how long Ctrl-C waits."""


def open_backend(options: BackendOptions) -> NativeBackend:
    """Check that the model fits into memory, then load it. Raises UsageError, ResourceError, HerdError."""
    with open_checkpoint(options.path) as checkpoint:
        config = checkpoint.config
        context = context_of(config, options)
        formats = weight_formats(checkpoint, options.quant)
        need = Need(options.kv, rows=ROWS, outputs=LOGIT_ROWS, promised=options.promised, limit=options.memory)
        size = options.page_tokens
        pages = -(-context // size)
        plan = plan_native(checkpoint, formats, need, pages * size)
        others = smaller_plans(checkpoint, plan, need, options.quant)
        require_memory(plan, name=options.path.name, alternatives=others)
        threads = thread_count(options.threads)
        activations = checkpoint.activations if options.quant is None else activations_of(options.quant)
        engine = make_engine(config, formats, checkpoint, activations=activations, threads=threads, cpus=options.cpus)
        load_weights(engine, checkpoint, formats, options.quant)
    spare = (MAX_SEQUENCES - 1) * plan.cache if plan.spare is None else plan.spare // 2
    page_bytes = max(1, plan.cache_per_token * size)
    pages += max(0, min(spare // page_bytes, (MAX_SEQUENCES - 1) * pages))
    cache = _native.Cache(options.kv, config.n_layers, config.n_kv_heads, config.head_dim, size, pages)
    return NativeBackend(config, engine, cache, context, plan.weights, promised=pages * page_bytes + plan.work)


_OPEN: WeakSet[NativeBackend] = WeakSet()


def _before_fork() -> None:
    for backend in list(_OPEN):  # another thread may open one meanwhile
        backend.before_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)


class NativeBackend:
    """See `herd.engine.backend.Backend`."""

    def __init__(
        self,
        config: LlamaConfig,
        engine: _native.Engine,
        cache: _native.Cache,
        context: int,
        weights: int,
        promised: int,
    ) -> None:
        """`weights`: bytes that they take; `promised`: those of cache and working space."""
        self.config = config
        self.context = context
        self.max_sequences = MAX_SEQUENCES
        self.threads = engine.threads
        self.identity = f"native {_native.isa()}"
        self.promised = promised
        self.memory = weights + promised
        self._engine: _native.Engine | None = engine
        self._cache: _native.Cache | None = cache
        # Memory grows to what runs together, and one context's worth of beginnings to be met again.
        self._pages = PagedCache(cache.pages, cache.page_tokens, self._copy_page, -(-context // cache.page_tokens))
        self._rotation = Rotation(config, context)
        self._sequences: dict[int, CachedSequence] = {}
        self._adapters: dict[str, int] = {}
        self._next = 0
        _OPEN.add(self)

    @property
    def cache_pages(self) -> tuple[int, int]:
        return self._pages.n_pages - self._pages.available, self._pages.n_pages

    def load_adapter(self, name: str, adapter: Adapter) -> None:
        assert self._engine is not None
        number = self._engine.add_adapter()
        try:
            for matrix, change in adapter.items():
                layer, projection = _place(matrix)
                self._engine.load_delta(number, layer, projection, change.a, change.b)
        except BaseException as error:
            self._engine.remove_adapter(number)
            if isinstance(error, ValueError):
                raise HerdError(f"this adapter cannot be applied: {error}", value=name) from None
            raise
        self._adapters[name] = number

    def unload_adapter(self, name: str) -> None:
        assert self._engine is not None
        # Its number is not given again, so what the cache remembers of it is found by nobody.
        self._engine.remove_adapter(self._adapters.pop(name))

    def reserve(
        self, capacity: int, prompt: Sequence[int] = (), adapter: str | None = None, salt: str = ""
    ) -> tuple[int, int] | None:
        if len(self._sequences) == self.max_sequences:
            return None
        sequence = self._pages.open(prompt, self._variant(adapter), salt)
        if self._sequences and not self._pages.grow(sequence, len(prompt) + 1 - len(sequence.tokens)):
            self._pages.release(sequence)
            return None
        return self._add(sequence), len(sequence.tokens)

    def fork(self, sequence: int, capacity: int) -> int | None:
        if len(self._sequences) == self.max_sequences:
            return None
        return self._add(self._pages.fork(self._sequences[sequence]))

    def grow(self, sequence: int, n_tokens: int) -> bool:
        return self._pages.grow(self._sequences[sequence], n_tokens)

    def truncate(self, sequence: int, length: int) -> None:
        self._pages.truncate(self._sequences[sequence], length)

    def release(self, sequence: int) -> None:
        self._pages.release(self._sequences.pop(sequence))

    def step(self, spans: Sequence[Span]) -> npt.NDArray[np.float32]:
        logits_NV = np.empty((sum(span.outputs for span in spans), self.config.vocab_size), np.float32)
        done = 0
        for part in _parts(spans):
            wanted = _wanted(part)
            self._run(part, wanted, logits=logits_NV[done : done + len(wanted)])
            done += len(wanted)
        return logits_NV

    def score(
        self, sequences: Sequence[Sequence[int]], vocabulary: int | None = None, adapter: str | None = None
    ) -> list[npt.NDArray[np.float32]]:
        rows = self.config.vocab_size if vocabulary is None else vocabulary
        results = []
        for tokens in sequences:
            logprobs = np.empty(max(0, len(tokens) - 1), np.float32)
            for start, part in self._passes(tokens[:-1], adapter):
                end = start + len(part.tokens)
                targets = np.asarray(tokens[start + 1 : end + 1], np.int32)
                wanted = np.arange(len(part.tokens), dtype=np.int32)
                outputs = {"targets": targets, "log_probabilities": logprobs[start:end]}
                self._run([part], wanted, vocabulary=rows, **outputs)
            results.append(logprobs)
        return results

    def embed(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> npt.NDArray[np.float32]:
        vectors_ND = np.empty((len(sequences), self.config.dim), np.float32)
        for vector_D, tokens in zip(vectors_ND, sequences, strict=True):
            pieces = self.embed_in_pieces(tokens, adapter)
            try:
                while True:
                    pieces.send(ROWS)
            except StopIteration as end:
                vector_D[:] = end.value
        return vectors_ND

    def embed_in_pieces(
        self, tokens: Sequence[int], adapter: str | None = None
    ) -> Generator[None, int, npt.NDArray[np.float32]]:
        return begun(self._embed(tokens, adapter))

    def _embed(self, tokens: Sequence[int], adapter: str | None) -> Generator[None, int, npt.NDArray[np.float32]]:
        states_SD = np.empty((len(tokens), self.config.dim), np.float32)
        handle = self._unremembered(adapter)
        try:
            if not self.grow(handle, len(tokens)):
                raise CacheFull()
            end = 0
            while end < len(tokens):
                start, end = end, min(len(tokens), end + (yield))
                for part in _parts([Span(handle, tokens[start:end], outputs=end - start)]):
                    wanted = _wanted(part)
                    self._run(part, wanted, states=states_SD[start : start + len(wanted)])
                    start += len(wanted)
        finally:
            self.release(handle)
        vector_D: npt.NDArray[np.float32] = states_SD.mean(0)
        return vector_D

    def settle(self) -> None:
        assert self._engine is not None
        self._engine.settle()

    def before_fork(self) -> None:
        """Make no more large pages: each would become a copy that is not shared with the child process."""
        if self._engine is not None:
            self._engine.before_fork()

    def close(self) -> None:
        self._engine = self._cache = None
        self._sequences.clear()

    def _copy_page(self, source: int, target: int) -> None:
        assert self._cache is not None
        self._cache.copy_page(source, target)

    def _add(self, sequence: CachedSequence) -> int:
        self._next += 1
        self._sequences[self._next] = sequence
        return self._next

    def _variant(self, adapter: str | None) -> int:
        """The number of an adapter, from 0, and -1 of the model itself: what they computed is remembered apart."""
        return -1 if adapter is None else self._adapters[adapter]

    def _passes(self, tokens: Sequence[int], adapter: str | None) -> Iterator[tuple[int, Span]]:
        """A sequence of its own for `tokens`, appended to piece by piece: (start, span to run next)."""
        if not tokens:
            return
        handle = self._unremembered(adapter)
        try:
            for start in range(0, len(tokens), ROWS):
                yield start, Span(handle, tokens[start : start + ROWS])
        finally:
            self.release(handle)

    def _unremembered(self, adapter: str | None) -> int:
        """A sequence without the prefix cache: every token's output is wanted, and it is no prompt to come."""
        return self._add(CachedSequence(self._variant(adapter), remembered=False))

    def _run(self, spans: Sequence[Span], wanted: npt.NDArray[np.int32], **outputs: Any) -> None:
        """One native call: append the spans, and fill `outputs` for the wanted rows."""
        assert self._engine is not None and self._cache is not None
        tokens: list[int] = []
        table: list[int] = []
        places = np.empty((len(spans), 4), np.int64)
        longest = 0
        for i, span in enumerate(spans):
            sequence = self._sequences[span.sequence]
            length = len(sequence.tokens) + len(span.tokens)
            if length > self.context:
                raise ContextLengthExceeded(length, self.context)
            if not self._pages.grow(sequence, len(span.tokens)):
                raise CacheFull()
            places[i] = len(span.tokens), len(sequence.tokens), len(table), sequence.variant
            tokens += span.tokens
            table += sequence.pages
            longest = max(longest, length)
        cosine, sine = self._rotation.up_to(longest)
        self._engine.step(
            self._cache, np.array(tokens, np.int32), places, np.array(table, np.int32), cosine, sine, wanted, **outputs
        )
        for span in spans:
            self._pages.append(self._sequences[span.sequence], span.tokens)


class Rotation:
    """Cosines and sines of the rotary angles, [positions, K/2], computed as far as they are needed.

    With "dynamic" scaling a position's frequencies are those of a text that ends there: so they are a function of the
    position alone, and a prompt gives the same keys whatever pieces it enters in.
    """

    def __init__(self, config: LlamaConfig, context: int) -> None:
        self._config = config
        self._context = context
        self._tables = (np.empty((0, config.head_dim // 2), np.float32),) * 2

    def up_to(self, length: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Tables of at least the first `length` positions."""
        if len(self._tables[0]) < length:
            size = min(self._context, max(2 * len(self._tables[0]), length, 512))
            self._tables = self._compute(max(size, length))
        return self._tables

    def _compute(self, length: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        positions = np.arange(length, dtype=np.float32)[:, None]
        frequencies = np.array(rope_frequencies(self._config, 1), np.float32)[None]
        scaling = self._config.rope_scaling
        if scaling is not None and scaling.kind == "dynamic" and length > scaling.original_context:
            frequencies = np.array([rope_frequencies(self._config, p + 1) for p in range(length)], np.float32)
        angles = positions * frequencies
        scale = np.float32(attention_scale(self._config))
        return np.cos(angles) * scale, np.sin(angles) * scale


def _place(matrix: str) -> tuple[int, str]:
    """Layer and projection of a canonical name such as "layers.3.attention.wq.weight"; (-1, name) for another."""
    parts = matrix.split(".")
    if parts[0] == "layers" and parts[-1] == "weight":
        return int(parts[1]), parts[-2]
    return -1, matrix


def _parts(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """The spans in calls of at most `ROWS` rows, cut where that takes it."""
    part: list[Span] = []
    room = ROWS
    for span in spans:
        start = 0
        while start < len(span.tokens):
            if room == 0:
                yield part
                part, room = [], ROWS
            count = min(room, len(span.tokens) - start)
            end = start + count
            outputs = max(0, end - max(start, len(span.tokens) - span.outputs))
            part.append(Span(span.sequence, span.tokens[start:end], outputs))
            start, room = end, room - count
    yield part


def _wanted(spans: Sequence[Span]) -> npt.NDArray[np.int32]:
    """Rows after whose tokens logits are asked for."""
    wanted: list[int] = []
    end = 0
    for span in spans:
        end += len(span.tokens)
        wanted += range(end - span.outputs, end)
    return np.array(wanted, np.int32)
