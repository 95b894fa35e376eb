"""The torch backend: `herd.model.Llama` behind the engine's protocol, in float32 or bfloat16.

It runs on a GPU where torch sees one, in bfloat16 unless asked otherwise, else on the CPU, in float32.

Live sequences occupy the first rows of one cache, without gaps: a decode step then works on a plain slice of it and
copies nothing. A released row is filled with the last one. The cache is shaped anew only when the batch outgrows it.
Letters: B rows, S tokens, D model width, V vocabulary, T tokens that are scored.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from herd.architecture import LlamaConfig
from herd.checkpoint import open_checkpoint
from herd.engine.backend import BackendOptions, Span, begun, context_of, thread_count
from herd.engine.memory import MemoryPlan, free_for, plan_memory, require_memory, smaller_contexts
from herd.engine.scheduler import PREFILL_TOKENS
from herd.errors import UsageError
from herd.model import KVCache, Llama, from_arrays

if TYPE_CHECKING:
    from herd.checkpoint import Adapter

MAX_SEQUENCES = 128
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_SCORE_TOKENS = 4096  # tokens of one forward pass when scoring
_HEAD_VALUES = 1 << 22  # logits that exist at a time when scoring
_ROUND = 64  # cache capacity is a multiple of this


def open_backend(options: BackendOptions) -> TorchBackend:
    """Check that the model fits into memory, then load it. Raises UsageError, ResourceError, HerdError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = options.quant or ("bf16" if device.type == "cuda" else "f32")
    if weights not in _DTYPES:
        raise UsageError("the torch backend cannot hold weights like this", value=weights, allowed=", ".join(_DTYPES))
    if options.kv not in _DTYPES:
        raise UsageError("the torch backend has no such cache", value=options.kv, allowed=", ".join(_DTYPES))
    with open_checkpoint(options.path) as checkpoint:
        config = checkpoint.config
        context = context_of(config, options)
        plan = _plan(config, weights, options, context, device)
        halved = [('quant="bf16", which halves the weights', _plan(config, "bf16", options, context, device))]
        others = [*smaller_contexts(plan), *(halved if weights == "f32" else [])]
        require_memory(plan, name=options.path.name, alternatives=others)
        torch.set_num_threads(thread_count(options.threads or torch.get_num_threads()))
        model = from_arrays(config, checkpoint, dtype=_DTYPES[weights], device=device)
    return TorchBackend(model.eval(), context, plan, _DTYPES[options.kv])


def _plan(config: LlamaConfig, weights: str, options: BackendOptions, context: int, device: torch.device) -> MemoryPlan:
    tokens = max(PREFILL_TOKENS, _SCORE_TOKENS)
    plan = plan_memory(
        config, weights=weights, kv=options.kv, context=context, prefill_tokens=tokens, rows=MAX_SEQUENCES
    )
    free = plan.free if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    return replace(plan, free=free_for(free, promised=options.promised, limit=options.memory))


class TorchBackend:
    """See `herd.engine.backend.Backend`."""

    def __init__(self, model: Llama, context: int, plan: MemoryPlan, cache_dtype: torch.dtype) -> None:
        self.config: LlamaConfig = model.config
        self.context = context
        self.max_sequences = MAX_SEQUENCES
        self.threads = torch.get_num_threads()
        self._model = model
        self._device = model.output_weight.device
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        self.identity = f"torch {torch.__version__} {name} {model.output_weight.dtype}"
        self._cache: KVCache | None = None
        self._cache_dtype = cache_dtype
        # Half of what is spare: while the cache is shaped anew, the old one is still there.
        spare = MAX_SEQUENCES * plan.cache if plan.spare is None else max(0, plan.spare // 2)
        self._max_tokens = context + spare // plan.cache_per_token
        self.promised = plan.work + self._max_tokens * plan.cache_per_token
        self.memory = plan.weights + self.promised
        self._rows: list[int] = []  # the sequence in each row of the cache
        self._capacities: dict[int, int] = {}
        self._next = 0

    @property
    def cache_pages(self) -> tuple[int, int]:
        """Of 64 tokens: every row has as many as the longest."""
        rows, longest = len(self._rows), max(list(self._capacities.values()), default=0)
        return rows * _rounded(longest) // _ROUND, self._max_tokens // _ROUND

    def load_adapter(self, name: str, adapter: Adapter) -> None:
        raise UsageError("the torch backend applies no adapters", value=name, fix='load with backend="native"')

    def unload_adapter(self, name: str) -> None:
        raise AssertionError("none was loaded")

    def reserve(
        self, capacity: int, prompt: Sequence[int] = (), adapter: str | None = None, salt: str = ""
    ) -> tuple[int, int] | None:
        tokens = (len(self._rows) + 1) * _rounded(max([capacity, *self._capacities.values()]))
        if self._rows and (len(self._rows) == self.max_sequences or tokens > self._max_tokens):
            return None
        self._next += 1
        self._rows.append(self._next)
        self._capacities[self._next] = capacity
        return self._next, 0

    @torch.inference_mode()
    def fork(self, sequence: int, capacity: int) -> int | None:
        reserved = self.reserve(capacity)
        if reserved is None:
            return None
        cache = self._fitting_cache()
        cache.copy_row(self._rows.index(sequence), self._rows.index(reserved[0]))
        return reserved[0]

    def grow(self, sequence: int, n_tokens: int) -> bool:
        return True  # `reserve` gave room for all tokens

    def truncate(self, sequence: int, length: int) -> None:
        self._fitting_cache().select([self._rows.index(sequence)]).truncate([length])

    @torch.inference_mode()
    def release(self, sequence: int) -> None:
        row, last = self._rows.index(sequence), len(self._rows) - 1
        if self._cache is not None and last < self._cache.batch:
            if row != last:
                self._cache.copy_row(last, row)
            self._cache.select([last]).truncate([0])
        self._rows[row] = self._rows[last]
        self._rows.pop()
        del self._capacities[sequence]

    @torch.inference_mode()
    def step(self, spans: Sequence[Span]) -> npt.NDArray[np.float32]:
        cache = self._fitting_cache()
        row_of = {sequence: row for row, sequence in enumerate(self._rows)}
        rows = [row_of[span.sequence] for span in spans]
        decoding = [i for i, span in enumerate(spans) if len(span.tokens) == 1]
        entering = [i for i, span in enumerate(spans) if len(span.tokens) > 1]
        ends = np.cumsum([span.outputs for span in spans])
        places = [range(end - span.outputs, end) for span, end in zip(spans, ends.tolist(), strict=True)]
        logits_NV = np.empty((int(ends[-1]), self.config.vocab_size), np.float32)
        if decoding:
            found = self._decode(cache, [rows[i] for i in decoding], [spans[i].tokens[0] for i in decoding])
            for i, logits_V in zip(decoding, found, strict=True):
                logits_NV[places[i]] = logits_V
        for group in _groups(entering, [len(span.tokens) for span in spans]):
            found = self._enter(cache, [rows[i] for i in group], [spans[i] for i in group])
            logits_NV[[place for i in group for place in places[i]]] = found
        return logits_NV

    @torch.inference_mode()
    def score(
        self, sequences: Sequence[Sequence[int]], vocabulary: int | None = None, adapter: str | None = None
    ) -> list[npt.NDArray[np.float32]]:
        results = [np.empty(0, np.float32)] * len(sequences)
        lengths = [len(sequence) for sequence in sequences]
        several = [i for i, length in enumerate(lengths) if length > 1]
        for group in _groups(several, lengths, _SCORE_TOKENS):
            x_BSD = self._model.hidden(self._padded([sequences[i] for i in group]))
            x_TD = torch.cat([x_BSD[b, : lengths[i] - 1] for b, i in enumerate(group)])
            targets_T = torch.tensor([token for i in group for token in sequences[i][1:]], device=self._device)
            logprobs_T = self._logprobs(x_TD, targets_T, vocabulary).numpy(force=True)
            ends = np.cumsum([lengths[i] - 1 for i in group])
            for i, logprobs in zip(group, np.split(logprobs_T, ends[:-1]), strict=True):
                results[i] = logprobs
        return results

    @torch.inference_mode()
    def embed(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> npt.NDArray[np.float32]:
        vectors_ND = np.empty((len(sequences), self.config.dim), np.float32)
        lengths = [len(sequence) for sequence in sequences]
        for group in _groups(range(len(sequences)), lengths, _SCORE_TOKENS):
            x_BSD = self._model.hidden(self._padded([sequences[i] for i in group])).float()
            for b, i in enumerate(group):
                vectors_ND[i] = x_BSD[b, : lengths[i]].mean(0).numpy(force=True)
        return vectors_ND

    def embed_in_pieces(
        self, tokens: Sequence[int], adapter: str | None = None
    ) -> Generator[None, int, npt.NDArray[np.float32]]:
        def all_at_once() -> Generator[None, int, npt.NDArray[np.float32]]:
            yield  # attention over a part that is cached would round in another way
            vector_D: npt.NDArray[np.float32] = self.embed([tokens], adapter)[0]
            return vector_D

        return begun(all_at_once())

    def settle(self) -> None:
        pass

    def close(self) -> None:
        del self._model
        self._cache = None

    def _decode(self, cache: KVCache, rows: list[int], tokens: list[int]) -> npt.NDArray[np.float32]:
        """One token for each of `rows`; other rows up to the last of them take part without effect."""
        width = max(rows) + 1
        lengths = [0] * width
        padded = [0] * width
        for row, token in zip(rows, tokens, strict=True):
            lengths[row], padded[row] = 1, token
        first_rows = cache.select(range(width))
        tokens_B1 = torch.tensor(padded, device=self._device).unsqueeze(1)
        x_BSD = self._model.hidden(tokens_B1, cache=first_rows, lengths=lengths)
        return self._logits(x_BSD[rows, 0])

    def _enter(self, cache: KVCache, rows: list[int], spans: list[Span]) -> npt.NDArray[np.float32]:
        """Several tokens for each of `rows`; logits after the last `outputs` of each."""
        lengths = [len(span.tokens) for span in spans]
        x_BSD = self._model.hidden(
            self._padded([span.tokens for span in spans]), cache=cache.select(rows), lengths=lengths
        )
        wanted = [x_SD[n - span.outputs : n] for x_SD, n, span in zip(x_BSD, lengths, spans, strict=True)]
        return self._logits(torch.cat(wanted))

    def _logits(self, x_BD: Tensor) -> npt.NDArray[np.float32]:
        logits_BV = functional.linear(x_BD, self._model.output_weight).float()
        found: npt.NDArray[np.float32] = logits_BV.numpy(force=True)
        return found

    def _logprobs(self, x_TD: Tensor, targets_T: Tensor, vocabulary: int | None) -> Tensor:
        """ln P of each target; the [T, V] logits exist only a few rows at a time."""
        rows = max(1, _HEAD_VALUES // self.config.vocab_size)
        parts = []
        for x_RD, targets_R in zip(torch.split(x_TD, rows), torch.split(targets_T, rows), strict=True):
            logits_RV = functional.linear(x_RD, self._model.output_weight[:vocabulary]).float()
            parts.append(logits_RV.gather(1, targets_R[:, None])[:, 0] - logits_RV.logsumexp(1))
        return torch.cat(parts)

    def _padded(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """[B, S] token ids, padded at the end, where no causal query sees it."""
        width = max(map(len, sequences))
        tokens_BS = np.zeros((len(sequences), width), np.int64)
        for b, sequence in enumerate(sequences):
            tokens_BS[b, : len(sequence)] = sequence
        return torch.from_numpy(tokens_BS).to(self._device)

    def _fitting_cache(self) -> KVCache:
        """The cache, with a row for every live sequence and as long as the longest may become."""
        capacity = _rounded(max(self._capacities.values()))
        cache = self._cache
        if cache is not None and len(self._rows) <= cache.batch and capacity <= cache.capacity:
            return cache
        batch = min(self.max_sequences, 1 << (len(self._rows) - 1).bit_length())
        batch = max(len(self._rows), min(batch, self._max_tokens // capacity))
        if cache is None or not any(cache.lengths):
            self._cache = cache = None  # give the memory back before taking more
        self._cache = KVCache(self.config, batch, capacity, self._cache_dtype, self._device)
        if cache is not None:
            _copy(cache, self._cache)
        return self._cache


def _copy(source: KVCache, target: KVCache) -> None:
    """Append all that `source` holds to the first rows of `target`, which are empty."""
    width = max(source.lengths)
    rows = min(source.batch, target.batch)  # rows beyond the live ones are empty
    write = target.select(range(rows)).reserve(source.lengths[:rows], width)
    for layer, (keys_BCGK, values_BCGK) in enumerate(zip(source.keys_LBCGK, source.values_LBCGK, strict=True)):
        write.write(layer, keys_BCGK[:rows, :width], values_BCGK[:rows, :width])
    write.commit()


def _rounded(capacity: int) -> int:
    return -(-capacity // _ROUND) * _ROUND


def _groups(items: Sequence[int], lengths: Sequence[int], budget: int | None = None) -> Iterator[list[int]]:
    """Items of like length together: a group's padding is at most a quarter of it, its tokens at most `budget`."""
    group: list[int] = []
    tokens = 0
    for item in sorted(items, key=lambda item: -lengths[item]):
        longest = lengths[group[0]] if group else lengths[item]
        padded = longest * (len(group) + 1)
        wasteful = (tokens + lengths[item]) * 4 < padded * 3
        if group and (wasteful or (budget is not None and padded > budget)):
            yield group
            group, tokens = [], 0
        group.append(item)
        tokens += lengths[item]
    if group:
        yield group
