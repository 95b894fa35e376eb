"""Logits to token ids, in numpy: the one sampler of every backend.

Steps for a row, in this order: penalties, logit bias, temperature, typical, top-k, nucleus (top-p), min-p, draw.
A row's outcome depends on the row's logits, its options, its seed and how many tokens it already has, and on nothing
else: neither the other rows of the batch nor their order change it. So a request repeats alone or in a crowd.

Shapes: B rows of a step, R the rows among them that draw, C candidates of a row, V vocabulary.
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
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class BrokenLogits(HerdError):
    """Some `rows` of a batch have logits that are not numbers: the weights they met are broken."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(
            "the model computed logits that are not numbers",
            fix="check the checkpoint with `herd convert --verify`; a training run may have diverged",
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

    def modify(self, logits_V: Floats) -> None:
        """Apply penalties and logit bias to this row's own copy of the logits, touching only the tokens concerned."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1.0 and self._seen:
            ids = np.fromiter(self._seen, np.int64, len(self._seen))
            seen = logits_V[ids]
            penalty = np.float32(sampling.repetition_penalty)
            logits_V[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self._generated and (sampling.presence_penalty or sampling.frequency_penalty):
            ids = np.fromiter(self._generated.keys(), np.int64, len(self._generated))
            counts = np.fromiter(self._generated.values(), np.float32, len(self._generated))
            logits_V[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if sampling.logit_bias:
            ids = np.fromiter(sampling.logit_bias.keys(), np.int64, len(sampling.logit_bias))
            logits_V[ids] += np.fromiter(sampling.logit_bias.values(), np.float32, len(ids))


def sample(logits_BV: npt.NDArray[np.float32], rows: Sequence[SamplerRow]) -> list[Choice]:
    """Choose one token per row and commit it to the row. `logits_BV` is not changed.

    Raises BrokenLogits, before anything is chosen, when rows hold logits that are no numbers.
    """
    changed = [b for b, row in enumerate(rows) if row.penalised or row.sampling.logit_bias]
    modified_BV = logits_BV
    if changed:
        modified_BV = logits_BV.copy()
        for b in changed:
            rows[b].modify(modified_BV[b])

    ids_B = modified_BV.argmax(axis=1)  # of a row with a not-a-number, argmax finds that
    best_B = modified_BV[np.arange(len(rows)), ids_B]
    broken = np.flatnonzero(~np.isfinite(best_B))
    if len(broken):
        raise BrokenLogits(broken.tolist())
    drawing = [b for b, row in enumerate(rows) if row.sampling.temperature > 0.0]
    if drawing:
        ids_B[drawing] = _draw(modified_BV[drawing], best_B[drawing], [rows[b] for b in drawing])

    asked = [b for b, row in enumerate(rows) if row.sampling.wants_logprobs]
    logprobs_BV = dict(zip(asked, log_softmax(logits_BV[asked]), strict=True)) if asked else {}
    choices = []
    for b, row in enumerate(rows):
        token_id = int(ids_B[b])
        row.commit(token_id)
        if b in logprobs_BV:
            logprobs_V = logprobs_BV[b]
            top = _top(logprobs_V, row.sampling.top_logprobs) if row.sampling.top_logprobs else None
            choices.append(Choice(token_id, float(logprobs_V[token_id]), top))
        else:
            choices.append(Choice(token_id))
    return choices


def log_softmax(logits_BV: Floats) -> npt.NDArray[np.float64]:
    """Natural log-probabilities of each row, in float64."""
    shifted_BV = logits_BV.astype(np.float64)
    shifted_BV -= shifted_BV.max(axis=1, keepdims=True)
    shifted_BV -= np.log(np.exp(shifted_BV).sum(axis=1, keepdims=True))
    return shifted_BV


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


def _draw(logits_RV: Floats, best_R: Floats, rows: Sequence[SamplerRow]) -> Ints:
    """One token per row by inverting the cumulative distribution of what the truncations leave."""
    vocabulary = logits_RV.shape[1]
    uniform_R = uniform(
        np.array([row.seed for row in rows], np.uint64), np.array([row.n_generated for row in rows], np.uint64)
    )
    temperature_R = np.array([row.sampling.temperature for row in rows], np.float32)
    top_k_R = np.array([min(row.sampling.top_k or vocabulary, vocabulary) for row in rows], np.int64)
    top_p_R = np.array([row.sampling.top_p for row in rows])
    min_p_R = np.array([row.sampling.min_p for row in rows])
    with np.errstate(under="ignore", over="ignore"):  # tiny temperatures: far tokens become exp(-inf) = 0
        weights_RV = np.exp((logits_RV - best_R[:, None]) / temperature_R[:, None])

    for weights_V, row in zip(weights_RV, rows, strict=True):
        if row.sampling.typical_p < 1.0:
            _keep_typical(weights_V, row.sampling.typical_p)

    ids_R = np.empty(len(rows), np.int64)
    unordered_R = (top_k_R == vocabulary) & (top_p_R >= 1.0)
    plain = np.flatnonzero(unordered_R)  # without top-k and nucleus no order is needed: draw as the vocabulary stands
    if len(plain):
        weights_PV = weights_RV[plain]
        weights_PV[weights_PV < min_p_R[plain, None]] = 0.0  # the most likely token's weight is exactly 1
        ids_R[plain] = _invert(weights_PV, uniform_R[plain])
    ranked = np.flatnonzero(~unordered_R)
    if len(ranked):
        weights_RV, top_k_R, top_p_R, min_p_R = weights_RV[ranked], top_k_R[ranked], top_p_R[ranked], min_p_R[ranked]
        total_R = weights_RV.sum(axis=1, dtype=np.float64)
        ids_RC, weights_RC = _candidates(weights_RV, _threshold(weights_RV, total_R, top_k_R, top_p_R, min_p_R))
        kept_RC = _truncate(weights_RC, total_R, top_k_R, top_p_R, min_p_R, vocabulary)
        picked_R = _invert(np.where(kept_RC, weights_RC, 0.0), uniform_R[ranked])
        ids_R[ranked] = ids_RC[np.arange(len(ranked)), picked_R]
    return ids_R


def _keep_typical(weights_V: Floats, typical_p: float) -> None:
    """Leave the tokens whose surprise -ln p is nearest to its mean, as few as reach the mass `typical_p`; in place.

    Locally typical sampling (Meister et al., arXiv 2202.00666), at least one token.
    """
    ids = np.flatnonzero(weights_V)
    p = weights_V[ids].astype(np.float64)
    p /= p.sum()
    surprise = -np.log(p)
    order = np.lexsort((ids, np.abs(surprise - (p * surprise).sum())))  # ties by smaller id
    before = np.cumsum(p[order]) - p[order]
    weights_V[ids[order[before >= typical_p]][int(typical_p == 0.0) :]] = 0.0


def _threshold(
    weights_RV: Floats, total_R: Floats, top_k_R: Ints, top_p_R: Floats, min_p_R: Floats
) -> npt.NDArray[np.float32]:
    """A weight per row below which nothing can be kept, so that only the rest needs sorting.

    With top-k: the k-th largest weight. With a nucleus alone: all tokens lighter than (1 - top_p) * total / V weigh
    less than (1 - top_p) * total together, so the mass before each of them is above top_p.
    """
    vocabulary = weights_RV.shape[1]
    threshold_R: Floats = 0.999 * np.maximum(
        (1.0 - top_p_R) * total_R / vocabulary, min_p_R
    )  # 0.999: safe against rounding
    for k in set(top_k_R.tolist()) - {vocabulary}:
        chosen = np.flatnonzero(top_k_R == k)
        threshold_R[chosen] = np.partition(weights_RV[chosen], vocabulary - k, axis=1)[:, vocabulary - k]
    return threshold_R.astype(np.float32)


def _candidates(weights_RV: npt.NDArray[np.float32], threshold_R: npt.NDArray[np.float32]) -> tuple[Ints, Floats]:
    """Ids and weights of the tokens at or above each row's threshold, largest first, ties by smaller id.

    Rows are padded with weight 0 to the width of the longest. The bits of a float32 that is not negative order like the
    number; so (inverted bits, id) as one uint64 is a key without ties, and the order never depends on how it is sorted.
    """
    n_rows, vocabulary = weights_RV.shape
    flat = np.flatnonzero(weights_RV >= threshold_R[:, None])
    row, ids = np.divmod(flat, vocabulary)
    counts_R = np.bincount(row, minlength=n_rows)
    column = np.arange(len(flat)) - (np.cumsum(counts_R) - counts_R)[row]
    bits = weights_RV.ravel()[flat].view(np.uint32)
    keys_RC = np.full((n_rows, counts_R.max()), ~np.uint64(0))  # padding: the bits of weight 0, after all tokens
    keys_RC[row, column] = ((~bits).astype(np.uint64) << np.uint64(32)) | ids.astype(np.uint64)
    keys_RC.sort(axis=1)
    weights_RC = (~(keys_RC >> np.uint64(32)).astype(np.uint32)).view(np.float32)
    return (keys_RC & np.uint64(0xFFFFFFFF)).astype(np.int64), weights_RC.astype(np.float64)


def _truncate(
    weights_RC: Floats, total_R: Floats, top_k_R: Ints, top_p_R: Floats, min_p_R: Floats, vocabulary: int
) -> Bools:
    """Which candidates (largest first) stay. `total_R` is the weight of the whole vocabulary.

    Top-k comes first and renormalises; the nucleus cuts where cumsum - p > top_p (Llama 3 reference code). Sums are
    running sums, so that the padding a crowd brings changes no bit.
    """
    cumulative_RC = np.cumsum(weights_RC, axis=1)
    width = weights_RC.shape[1]
    within_k_RC = np.arange(width) < top_k_R[:, None]
    mass_of_k_R = cumulative_RC[np.arange(len(top_k_R)), np.minimum(top_k_R, width) - 1]
    mass_R = np.where(top_k_R < vocabulary, mass_of_k_R, total_R)
    kept_RC: Bools = within_k_RC & (cumulative_RC - weights_RC <= (top_p_R * mass_R)[:, None])
    return kept_RC & (weights_RC >= min_p_R[:, None] * weights_RC[:, :1]) & (weights_RC > 0)


def _invert(weights_RC: Floats, uniform_R: Floats) -> Ints:
    """Index of the first candidate whose cumulative weight exceeds uniform * total."""
    cumulative_RC = np.cumsum(weights_RC, axis=1, dtype=np.float64)
    index_R = (cumulative_RC <= (uniform_R * cumulative_RC[:, -1])[:, None]).sum(axis=1)
    last_R = weights_RC.shape[1] - 1 - (weights_RC[:, ::-1] > 0).argmax(axis=1)  # against rounding at the very end
    clipped_R: Ints = np.minimum(index_R, last_R)
    return clipped_R


def _top(logprobs_V: npt.NDArray[np.float64], n: int) -> list[tuple[int, float]]:
    n = min(n, len(logprobs_V))
    ids = np.argpartition(logprobs_V, -n)[-n:]
    ids = ids[np.lexsort((ids, -logprobs_V[ids]))]
    return [(int(i), float(logprobs_V[i])) for i in ids]
