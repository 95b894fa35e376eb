"""Logits to token ids, in numpy: the one sampler of every backend.

Steps for a row, in this order: penalties, logit bias, grammar, temperature, typical, top-k, nucleus (top-p), min-p,
draw. A row's outcome depends on the row's logits, its options, its seed and the tokens it already has, and on nothing
else: neither the other rows of the batch nor their order change it. So a request repeats alone or in a crowd.

Rows with the same options are taken together, as many as the processor's cache has room for: numpy's some thirty calls
cost more than what they do with a row of 4,096 logits. No bit of a row depends on those beside it: running sums go from
left to right, and other sums are of float64 along a row.

Shapes: B rows of a step, R rows that are taken together, C candidates of a row, V vocabulary. A token's gap is best
logit - its logit, 0 and up.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from herd.engine.constraint import Constraint, GrammarFailed
from herd.engine.request import Sampling
from herd.errors import HerdError

Floats = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

_GAMMA = 0x9E3779B97F4A7C15
_64_BITS = 2**64 - 1
_LARGEST = float(np.finfo(np.float32).max)
_TOGETHER = 1 << 15  # logits of rows that are taken together: larger arrays come fresh from the system every time
_NUCLEUS = 64  # tokens that the nucleus is first looked for among
_BLOCK = 256  # weights that are summed up together before one of them is chosen
_NOBODY = np.uint64(0x7F800000 << 32)  # the key of a token with an infinite gap


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
    """Sampling state of one sequence: its options, seed, the tokens that penalties look at, its place in a grammar."""

    def __init__(
        self, sampling: Sampling, seed: int, prompt_ids: Iterable[int] = (), constraint: Constraint | None = None
    ) -> None:
        self.sampling = sampling
        self.seed = seed
        self.constraint = constraint
        self.n_generated = 0
        self._generated: Counter[int] = Counter()
        self._seen: set[int] = set()
        if sampling.repetition_penalty != 1.0:
            self._seen.update(prompt_ids)
        self.drawing = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.typical_p)
        self.penalised = (
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )

    def commit(self, token_id: int) -> None:
        """Count a chosen token: it moves the random counter and feeds the penalties."""
        self.n_generated += 1
        if self.penalised:
            self._generated[token_id] += 1
            self._seen.add(token_id)
        if self.constraint is not None:
            self.constraint.commit(token_id)

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

    Raises BrokenLogits when rows hold logits that are no numbers, and GrammarFailed when rows cannot go on in their
    grammar, before anything is chosen.
    """
    modified = [row.modified(logits_V) for logits_V, row in zip(logits_BV, rows, strict=True)]
    ids = _best(modified)
    for b, row in enumerate(rows):
        if row.constraint is not None:
            try:
                modified[b] = row.constraint.masked(modified[b])
            except GrammarFailed as error:
                raise GrammarFailed(error.grammar, error.message, [b]) from None
            (ids[b],) = _best([modified[b]], [b])
    groups = _alike(rows, max(1, _TOGETHER // logits_BV.shape[1]))
    if groups:
        # Gaps that are too large for a float32, of tiny temperatures; weights of next to nothing.
        with np.errstate(over="ignore", under="ignore"):
            for group in groups:
                gap_RV = np.empty((len(group), logits_BV.shape[1]), np.float32)
                for gap_V, b in zip(gap_RV, group, strict=True):
                    _gap(modified[b], modified[b][ids[b]], out=gap_V)
                u_R = np.array([uniform(rows[b].seed, rows[b].n_generated) for b in group])
                for b, token_id in zip(group, _draw(gap_RV, rows[group[0]].sampling, u_R).tolist(), strict=True):
                    ids[b] = token_id
    choices = []
    for logits_V, row, token_id in zip(logits_BV, rows, ids, strict=True):
        row.commit(token_id)
        wanted = row.sampling.wants_logprobs
        choices.append(with_logprobs(logits_V, token_id, row.sampling.top_logprobs) if wanted else Choice(token_id))
    return choices


def _best(logits: Sequence[Floats], names: Sequence[int] | None = None) -> list[int]:
    """The most likely token of each row. Raises BrokenLogits where that has no finite logit."""
    ids = [int(logits_V.argmax()) for logits_V in logits]  # of a row with a not-a-number, argmax finds that
    broken = [b for b, (logits_V, i) in enumerate(zip(logits, ids, strict=True)) if not np.isfinite(logits_V[i])]
    if broken:
        raise BrokenLogits(broken if names is None else [names[b] for b in broken])
    return ids


def _alike(rows: Sequence[SamplerRow], most: int) -> list[list[int]]:
    """Rows that draw, those with the same options together, at most so many in a group."""
    alike: dict[tuple[float, ...], list[int]] = {}
    for b, row in enumerate(rows):
        if row.sampling.temperature > 0.0:
            alike.setdefault(row.drawing, []).append(b)
    return [group[start : start + most] for group in alike.values() for start in range(0, len(group), most)]


def with_logprobs(logits_V: Floats, token_id: int, n_top: int) -> Choice:
    """The choice with natural log-probabilities in float64, its own and those of the `n_top` most likely tokens."""
    best = logits_V.max()
    exact_V = logits_V.astype(np.float64)
    exact_V -= best
    with np.errstate(under="ignore"):
        log_total = float(best) + float(np.log(np.exp(exact_V, out=exact_V).sum()))
    top = None
    if n_top:
        with np.errstate(over="ignore"):
            gap_V = _gap(logits_V, best)
        ids = _ids(_most_likely(gap_V[None], min(n_top, len(logits_V)))[0])
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
    return _mix(_mix(seed) + index) >> 1


def uniform(seed: int, counter: int) -> float:
    """A random number in [0, 1) as a pure function of (seed, counter).

    SplitMix64 (Steele, Lea, Flood 2014) read at position `counter` of the stream whose start is the mixed seed.
    """
    return (_mix(_mix(seed) + counter * _GAMMA) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    """One output of SplitMix64 for state z; arithmetic is modulo 2**64."""
    z = (z + _GAMMA) & _64_BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return z ^ (z >> 31)


def _draw(gap_RV: Floats, sampling: Sampling, u_R: Floats) -> Ints:
    """A token for each row by inverting the cumulative distribution of what the truncations leave, at u in [0, 1).

    Top-k comes first and renormalises; the nucleus cuts where cumsum - p > top_p (Llama 3 reference code).
    """
    vocabulary = gap_RV.shape[1]
    temperature = np.float32(max(sampling.temperature, 1e-30))
    if sampling.typical_p < 1.0:
        for gap_V in gap_RV:
            _drop_untypical(gap_V, temperature, sampling.typical_p)
    if 0 < sampling.top_k < vocabulary:
        return _draw_in_order(gap_RV, None, temperature, sampling, u_R, sampling.top_k)
    weights_RV = gap_RV / -temperature
    np.exp(weights_RV, out=weights_RV)
    if sampling.top_p < 1.0:
        total_R = np.array([weights_V.sum(dtype=np.float64) for weights_V in weights_RV])
        return _draw_in_order(gap_RV, total_R, temperature, sampling, u_R, min(_NUCLEUS, vocabulary))
    if sampling.min_p > 0.0:
        weights_RV[weights_RV < sampling.min_p * weights_RV.max(axis=1, keepdims=True)] = 0.0
    return _draw_as_it_stands(weights_RV, u_R)


def _draw_in_order(
    gap_RV: Floats, total_R: Floats | None, temperature: np.float32, sampling: Sampling, u_R: Floats, n: int
) -> Ints:
    """Draw among the `n` most likely tokens, and among more where the nucleus may go on behind them.

    `total_R`: weight of the whole vocabulary; None: top-k leaves these n tokens only.
    """
    keys_RC = _most_likely(gap_RV, n)[:, :n]
    weights_RC = np.exp(_gaps(keys_RC) / -temperature)
    cumulative_RC = weights_RC.cumsum(axis=1, dtype=np.float64)
    mass_R = sampling.top_p * (cumulative_RC[:, -1] if total_R is None else total_R)
    kept_RC = cumulative_RC - weights_RC <= mass_R[:, None]
    if sampling.min_p > 0.0:
        kept_RC &= weights_RC >= sampling.min_p * weights_RC[:, :1]
    target_R = u_R * cumulative_RC.max(axis=1, where=kept_RC, initial=0.0)
    # There is one above: a float64 times u, which is 1 - 2**-53 at most, is less than it was.
    first_R = (cumulative_RC > target_R[:, None]).argmax(axis=1)
    ids_R = _ids(keys_RC[np.arange(len(u_R)), first_R])
    if total_R is not None and kept_RC.shape[1] == n < gap_RV.shape[1] and kept_RC[:, -1].any():
        more, on = min(8 * n, gap_RV.shape[1]), np.flatnonzero(kept_RC[:, -1])
        ids_R[on] = _draw_in_order(gap_RV[on], total_R[on], temperature, sampling, u_R[on], more)
    return ids_R


def _draw_as_it_stands(weights_RV: Floats, u_R: Floats) -> Ints:
    """Draw from the whole vocabulary, which needs no order: a block by the blocks' sums, then a token inside it."""
    rows, vocabulary = np.arange(len(u_R)), weights_RV.shape[1]
    sums_RC = np.add.reduceat(weights_RV.astype(np.float64), np.arange(0, vocabulary, _BLOCK), axis=1)
    cumulative_RC = sums_RC.cumsum(axis=1)
    target_R = u_R * cumulative_RC[:, -1]
    block_R = (cumulative_RC > target_R[:, None]).argmax(axis=1)
    left_R = target_R - np.where(block_R > 0, cumulative_RC[rows, block_R - 1], 0.0)
    ids_RC = _BLOCK * block_R[:, None] + np.arange(min(_BLOCK, vocabulary))
    weights_RC = np.where(ids_RC < vocabulary, weights_RV[rows[:, None], np.minimum(ids_RC, vocabulary - 1)], 0)
    inside_RC = weights_RC.cumsum(axis=1, dtype=np.float64)
    # Summed up in another order, a block may not quite reach what is left: then its last token is meant.
    left_R = np.minimum(left_R, np.nextafter(inside_RC[:, -1], 0.0))
    ids_R: Ints = _BLOCK * block_R + (inside_RC > left_R[:, None]).argmax(axis=1)
    return ids_R


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


def _gap(logits_V: Floats, best: np.float32, out: Floats | None = None) -> Floats:
    """What each logit lacks of the best one: 0 and up, and never -0."""
    return np.subtract(best + np.float32(0.0), logits_V, out=out)


def _most_likely(gap_RV: Floats, n: int) -> npt.NDArray[np.uint64]:
    """Keys of the `n` tokens with the smallest gap, and perhaps more, in order, ties by id; see `_gaps` and `_ids`.

    None has an infinite gap, but those that fill up rows with fewer tokens than others.
    The n-th smallest of the minima of groups is a gap that n tokens are within, and few more, at the cost of one pass.
    The bits of a float32 that is not negative order like the number, so (bits, id) is a key without ties.
    """
    rows, vocabulary = gap_RV.shape
    groups = 4 * n
    height = vocabulary // groups
    smallest = gap_RV[:, : height * groups].reshape(rows, height, groups).min(axis=1) if height > 1 else gap_RV
    bound_R1 = np.partition(smallest, n - 1, axis=1)[:, n - 1 : n]
    places = np.flatnonzero(gap_RV <= np.minimum(bound_R1, _LARGEST))
    keys = gap_RV.reshape(-1)[places].view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= (places % vocabulary).astype(np.uint64)
    if rows == 1:
        keys_RC = keys[None]
    else:
        counts_R = np.bincount(places // vocabulary, minlength=rows)
        keys_RC = np.full((rows, counts_R.max()), _NOBODY)
        keys_RC[np.arange(keys_RC.shape[1]) < counts_R[:, None]] = keys
    keys_RC.sort(axis=1)
    return keys_RC


def _gaps(keys: npt.NDArray[np.uint64]) -> Floats:
    return (keys >> np.uint64(32)).astype(np.uint32).view(np.float32)


def _ids(keys: npt.NDArray[np.uint64]) -> Ints:
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
