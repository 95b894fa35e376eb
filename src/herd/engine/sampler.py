"""Logits to token ids, in numpy: the one sampler of every backend.

Steps for a row, in this order: penalties, logit bias, temperature, typical, top-k, nucleus (top-p), min-p, draw.
A row's outcome depends on the row's logits, its options, its seed and how many tokens it already has, and on nothing
else: neither the other rows of the batch nor their order change it. So a request repeats alone or in a crowd.

Rows are taken one by one: what a row of 128,256 logits needs stays in the processor's cache.

Shapes: B rows of a step, C candidates of a row, V vocabulary. A token's gap is best logit - its logit, 0 and up.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from herd.engine.request import Sampling
from herd.errors import HerdError

Floats = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_LARGEST = float(np.finfo(np.float32).max)
_BLOCK = 256  # weights that are summed up together before one of them is chosen


class BrokenLogits(HerdError):
    """Some `rows` of a batch have logits that are not numbers: the weights they met are broken."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(
            "the model computed logits that are not numbers",
            fix="look into the checkpoint with `herd inspect --check`; a training run may have diverged",
        )
        self.rows = rows


@dataclass(frozen=True)
class Choice:
    """The token chosen for a row, with its log-probability under the unmodified model where the row asked for it."""

    token_id: int
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None


class SamplerRow:
    """Sampling state of one sequence: its options, its seed, and the tokens that penalties look at."""

    def __init__(self, sampling: Sampling, seed: int, prompt_ids: Iterable[int] = ()) -> None:
        self.sampling = sampling
        self.seed = seed
        self.n_generated = 0
        self._generated: Counter[int] = Counter()
        self._seen: set[int] = set()
        if sampling.repetition_penalty != 1.0:
            self._seen.update(prompt_ids)
        self.penalised = (
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )

    def commit(self, token_id: int) -> None:
        """Count a chosen token: it moves the random counter and feeds the penalties."""
        self.n_generated += 1
        if self.penalised:
            self._generated[token_id] += 1
            self._seen.add(token_id)

    def modified(self, logits_V: Floats) -> Floats:
        """The logits with penalties and logit bias applied: a copy, or themselves where nothing changes."""
        sampling = self.sampling
        if not self.penalised and not sampling.logit_bias:
            return logits_V
        logits_V = logits_V.copy()
        if sampling.repetition_penalty != 1.0 and self._seen:
            ids = np.fromiter(self._seen, np.int64, len(self._seen))
            seen = logits_V[ids].astype(np.float64)
            penalised = np.where(seen > 0, seen / sampling.repetition_penalty, seen * sampling.repetition_penalty)
            logits_V[ids] = np.where(np.isfinite(seen), np.clip(penalised, -_LARGEST, _LARGEST), seen)
        if self._generated and (sampling.presence_penalty or sampling.frequency_penalty):
            ids = np.fromiter(self._generated.keys(), np.int64, len(self._generated))
            counts = np.fromiter(self._generated.values(), np.float32, len(self._generated))
            logits_V[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if sampling.logit_bias:
            ids = np.fromiter(sampling.logit_bias.keys(), np.int64, len(sampling.logit_bias))
            logits_V[ids] += np.fromiter(sampling.logit_bias.values(), np.float32, len(ids))
        return logits_V


def sample(logits_BV: npt.NDArray[np.float32], rows: Sequence[SamplerRow]) -> list[Choice]:
    """Choose one token per row and commit it to the row. `logits_BV` is not changed.

    Raises BrokenLogits, before anything is chosen, when rows hold logits that are no numbers.
    """
    modified = [row.modified(logits_V) for logits_V, row in zip(logits_BV, rows, strict=True)]
    ids = [int(logits_V.argmax()) for logits_V in modified]  # of a row with a not-a-number, argmax finds that
    broken = [b for b, (logits_V, i) in enumerate(zip(modified, ids, strict=True)) if not np.isfinite(logits_V[i])]
    if broken:
        raise BrokenLogits(broken)
    drawing = [b for b, row in enumerate(rows) if row.sampling.temperature > 0.0]
    if drawing:
        seeds = np.array([rows[b].seed for b in drawing], np.uint64)
        counters = np.array([rows[b].n_generated for b in drawing], np.uint64)
        for b, u in zip(drawing, uniform(seeds, counters).tolist(), strict=True):
            ids[b] = _draw(modified[b], modified[b][ids[b]], rows[b].sampling, u)
    choices = []
    for logits_V, row, token_id in zip(logits_BV, rows, ids, strict=True):
        row.commit(token_id)
        wanted = row.sampling.wants_logprobs
        choices.append(_with_logprobs(logits_V, token_id, row.sampling.top_logprobs) if wanted else Choice(token_id))
    return choices


def _with_logprobs(logits_V: Floats, token_id: int, n_top: int) -> Choice:
    """The choice with natural log-probabilities in float64, its own and those of the `n_top` most likely tokens."""
    best = logits_V.max()
    exact_V = logits_V.astype(np.float64)
    exact_V -= best
    log_total = float(best) + float(np.log(np.exp(exact_V, out=exact_V).sum()))
    top = None
    if n_top:
        ids = _most_likely(_gap(logits_V, best), min(n_top, len(logits_V)))
        ids = ids[np.lexsort((ids, -logits_V[ids]))][:n_top]  # different logits may have the same gap
        top = [(i, float(logits_V[i]) - log_total) for i in ids.tolist()]
    return Choice(token_id, float(logits_V[token_id]) - log_total, top)


def fresh_seed() -> int:
    """A seed nobody asked for, from the operating system; small enough to be typed again."""
    return secrets.randbits(31)


def fold_seed(seed: int, index: int) -> int:
    """Seed of the `index`-th completion of a request; the first one keeps the request's seed."""
    if index == 0:
        return seed
    return int(_mix(_mix(np.array([seed], np.uint64)) + np.uint64(index))[0] >> np.uint64(1))


def uniform(seeds_R: npt.NDArray[np.uint64], counters_R: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1) as a pure function of (seed, counter).

    SplitMix64 (Steele, Lea, Flood 2014) read at position `counter` of the stream whose start is the mixed seed.
    """
    bits_R = _mix(_mix(seeds_R) + counters_R * _GAMMA) >> np.uint64(11)
    return bits_R.astype(np.float64) * 2.0**-53


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One output of SplitMix64 for state z; arithmetic is modulo 2**64."""
    z = z + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _draw(logits_V: Floats, best: np.float32, sampling: Sampling, u: float) -> int:
    """A token by inverting the cumulative distribution of what the truncations leave, at `u` in [0, 1).

    Top-k comes first and renormalises; the nucleus cuts where cumsum - p > top_p (Llama 3 reference code).
    """
    vocabulary = len(logits_V)
    temperature = np.float32(max(sampling.temperature, 1e-30))
    with np.errstate(over="ignore", under="ignore"):  # far tokens of tiny temperatures: e^-inf is 0
        gap_V = _gap(logits_V, best)
        if sampling.typical_p < 1.0:
            _drop_untypical(gap_V, temperature, sampling.typical_p)
        k = min(sampling.top_k or vocabulary, vocabulary)
        if k < vocabulary:
            ids_C = _most_likely(gap_V, k)[:k]
            weights_C = np.exp(gap_V[ids_C] / -temperature)
            cumulative_C = np.cumsum(weights_C, dtype=np.float64)
            total = cumulative_C[-1]
        else:
            weights_V = gap_V / -temperature
            np.exp(weights_V, out=weights_V)
            if sampling.top_p >= 1.0:  # no order is needed: draw as the vocabulary stands
                if sampling.min_p > 0.0:
                    weights_V[weights_V < sampling.min_p * weights_V.max()] = 0.0
                return _invert(weights_V, u)
            total = weights_V.sum(dtype=np.float64)
            n = 4
            while True:  # the nucleus is mostly a few tokens; those not looked at follow behind it
                n = min(16 * n, vocabulary)
                ids_C = _most_likely(gap_V, n)
                weights_C = weights_V[ids_C]
                cumulative_C = np.cumsum(weights_C, dtype=np.float64)
                lightest = weights_C[-1]  # what was not looked at is no heavier
                whole = n == vocabulary or len(ids_C) < n or lightest == 0.0
                if whole or cumulative_C[-1] > sampling.top_p * total or lightest < sampling.min_p * weights_C[0]:
                    break
    kept_C = (cumulative_C - weights_C <= sampling.top_p * total) & (weights_C >= sampling.min_p * weights_C[0])
    cumulative_C = cumulative_C[: np.count_nonzero(kept_C)]
    return int(ids_C[_first_above(cumulative_C, u * cumulative_C[-1])])


def _drop_untypical(gap_V: Floats, temperature: np.float32, typical_p: float) -> None:
    """Leave the tokens whose surprise -ln p is nearest to its mean, as few as reach the mass `typical_p`; in place.

    Locally typical sampling (Meister et al., arXiv 2202.00666), at least one token.
    """
    weights_V = np.exp(gap_V / -temperature)
    ids = np.flatnonzero(weights_V)
    p = weights_V[ids].astype(np.float64)
    p /= p.sum()
    surprise = -np.log(p)
    order = np.lexsort((ids, np.abs(surprise - (p * surprise).sum())))  # ties by smaller id
    before = np.cumsum(p[order]) - p[order]
    kept = ids[order[: max(1, int(np.count_nonzero(before < typical_p)))]]
    gap_of_kept = gap_V[kept]
    gap_V.fill(np.inf)
    gap_V[kept] = gap_of_kept


def _gap(logits_V: Floats, best: np.float32) -> Floats:
    """What each logit lacks of the best one: 0 and up, and never -0."""
    with np.errstate(over="ignore"):
        gap_V: Floats = best - logits_V
    gap_V += np.float32(0.0)
    return gap_V


def _most_likely(gap_V: Floats, n: int) -> Ints:
    """Ids of the `n` tokens with the smallest gap, and perhaps more, in order, ties by id; none with an infinite one.

    The n-th smallest of the minima of groups is a gap that n tokens are within, and few more, at the cost of one pass.
    The bits of a float32 that is not negative order like the number, so (bits, id) is a key without ties.
    """
    groups = 4 * n
    height = len(gap_V) // groups
    smallest = gap_V[: height * groups].reshape(height, groups).min(axis=0) if height > 1 else gap_V
    bound = np.partition(smallest, n - 1)[n - 1]
    ids = np.flatnonzero(gap_V <= min(bound, _LARGEST))
    keys = gap_V[ids].view(np.uint32).astype(np.uint64) << np.uint64(32) | ids.astype(np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _invert(weights_C: Floats, u: float) -> int:
    """Index of the first weight at which the running sum exceeds u times the whole: by blocks, then one by one."""
    starts = np.arange(0, len(weights_C), _BLOCK)
    sums = np.add.reduceat(weights_C, starts, dtype=np.float64)
    cumulative = np.cumsum(sums)
    block, left = _first_above(cumulative, u * cumulative[-1]), u * cumulative[-1]
    if block:
        left -= cumulative[block - 1]
    inside = np.cumsum(weights_C[_BLOCK * block : _BLOCK * (block + 1)], dtype=np.float64)
    return _BLOCK * block + _first_above(inside, left)


def _first_above(cumulative: Floats, target: float) -> int:
    """Index of the first running sum above the target; rounding may lift it to the last one: then where that begins."""
    return int(min(np.searchsorted(cumulative, target, "right"), np.searchsorted(cumulative, cumulative[-1], "left")))
