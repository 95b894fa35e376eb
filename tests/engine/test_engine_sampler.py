"""The sampler against transformers' logits processors, the stated distribution, and itself in crowds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.engine.request import Sampling
from herd.engine.sampler import (
    BrokenLogits,
    SamplerRow,
    _draw_as_it_stands,
    _gaps,
    _ids,
    _most_likely,
    fold_seed,
    sample,
    uniform,
)


def row(seed: int = 0, prompt: tuple[int, ...] = (), **options: object) -> SamplerRow:
    return SamplerRow(Sampling.from_options(options), seed, prompt)


def logits(n_rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (n_rows, vocabulary)).astype(np.float32)


def log_softmax(logits_BV: np.ndarray) -> np.ndarray:
    shifted = logits_BV.astype(np.float64) - logits_BV.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def kept_by_transformers(logits_V: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Independent oracle: transformers' warpers in transformers' order."""
    import torch
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores = torch.from_numpy(logits_V.astype(np.float64))[None]
    warpers = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        scores = warper(None, scores)
    return set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("vocabulary", [50, 1000, 3001])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (0.6, 0, 0.9, 0.0),
        (1.0, 40, 1.0, 0.0),
        (1.3, 40, 0.8, 0.0),
        (1.0, 0, 1.0, 0.05),
        (2.0, 0, 0.99, 0.001),
        (3.0, 700, 0.95, 0.0),
        (0.6, 1, 0.5, 0.0),
        (1.0, 0, 0.0, 0.0),
        (1.0, 40, 1.0, 0.2),
        (1.0, 0, 0.9, 0.2),
        (200.0, 0, 0.05, 0.0),
    ],
)
def test_support_and_distribution_equal_transformers(
    vocabulary: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Over an even grid of random numbers, each kept token is drawn in proportion to its renormalised probability."""
    logits_V = logits(1, vocabulary, seed=vocabulary)[0]
    # transformers keeps at least one token for top_p=0; ours as well (the mass before the first is 0)
    kept = kept_by_transformers(logits_V, temperature, min(top_k, vocabulary), max(top_p, 1e-9), min_p)
    options = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    n = 2000
    rows = [SamplerRow(options, seed, ()) for seed in range(n)]
    ids = [choice.token_id for choice in sample(np.repeat(logits_V[None], n, axis=0), rows)]
    assert set(ids) <= kept
    kept_ids = sorted(kept)
    p = np.exp(log_softmax(logits_V[None] / temperature)[0][kept_ids])
    p /= p.sum()
    counts = np.bincount(ids, minlength=vocabulary)[kept_ids]
    spread = np.sqrt(n * p * (1 - p)) + 1e-9
    assert np.all(np.abs(counts - n * p) < 5 * spread + 3)


def test_truncation_is_the_reference_rule() -> None:
    """Mask where cumsum - p > top_p (Meta's sample_top_p), computed here with torch as in the reference."""
    import torch

    for seed in range(20):
        logits_V = logits(1, 300, seed)[0]
        probs = torch.softmax(torch.from_numpy(logits_V / np.float32(0.6)), dim=-1)
        probs_sort, probs_idx = torch.sort(probs, dim=-1, descending=True)
        mask = torch.cumsum(probs_sort, dim=-1) - probs_sort > 0.9
        reference = probs_idx[~mask].tolist()
        # From the most likely to the least, each as often as it is likely: the last one of all is the last one kept.
        rows = [row(seed=s, temperature=0.6, top_p=0.9) for s in range(4000)]
        drawn = {choice.token_id for choice in sample(np.repeat(logits_V[None], len(rows), axis=0), rows)}
        assert drawn <= set(reference)
        assert {i for i in reference if probs[i] > 0.005} <= drawn


@pytest.mark.parametrize("n", [1, 3, 17, 64, 2000])
@pytest.mark.parametrize("values", [2, 40, 10**6])
def test_the_most_likely_tokens_are_in_order_with_ties_by_id(n: int, values: int) -> None:
    """In rows of which some have few tokens, or many of the same gap."""
    gap_RV = np.random.default_rng(values).integers(0, values, (5, 2000)).astype(np.float32) / 5
    gap_RV[:, ::7] = np.inf
    gap_RV[1, 3:] = np.inf
    gap_RV[2, 5:1000] = 0
    for rows in (slice(0, 1), slice(0, 5)):
        keys_RC = _most_likely(gap_RV[rows], n)
        assert keys_RC.shape[1] <= np.isfinite(gap_RV[rows]).sum(axis=1).max()
        for gap_V, keys_C in zip(gap_RV[rows], keys_RC, strict=True):
            found = _ids(keys_C[np.isfinite(_gaps(keys_C))])
            assert len(found) >= min(n, np.isfinite(gap_V).sum())
            np.testing.assert_array_equal(found, np.argsort(gap_V, kind="stable")[: len(found)])
            np.testing.assert_array_equal(_gaps(keys_C)[: len(found)], gap_V[found])
            assert np.isinf(_gaps(keys_C)[len(found) :]).all()
            assert gap_V[found[-1]] < np.sort(gap_V)[len(found)], "no token of the same gap is left"
    if values == 10**6 and n <= 64:
        assert len(_most_likely(gap_RV[:1], n)[0]) <= 2 * n


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 300, 3000])
@pytest.mark.parametrize("power", [1, 30])
def test_a_draw_inverts_the_cumulative_distribution(n: int, power: int) -> None:
    """Also where sums of very different weights are rounded, at the largest random number."""
    u_R = np.array([0.0, 0.1, 0.5, 0.9, 0.999, *[1 - 2**-53] * 50])
    weights_RV = np.random.default_rng(n).random((len(u_R), n)).astype(np.float32) ** power
    weights_RV[np.random.default_rng(1).random(weights_RV.shape) < 0.6] = 0.0
    weights_RV[:20, n // 2] = weights_RV[20:, -1] = 1.0
    weights_RV[20:, : (n - 1) // 256 * 256] = 0.0  # all in the last block, which may be a short one
    for weights_V, u, index in zip(weights_RV, u_R, _draw_as_it_stands(weights_RV, u_R), strict=True):
        cumulative = np.cumsum(weights_V.astype(np.float64)) / weights_V.sum(dtype=np.float64)
        assert weights_V[index] > 0
        assert cumulative[index] >= u - 1e-12 and (index == 0 or cumulative[index - 1] <= u + 1e-12)


def kept_by_the_rules(logits_V: np.ndarray, options: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """All tokens sorted, the rules one after the other: ids and weights of what is left, most likely first."""
    gap_V = logits_V.max() - logits_V + np.float32(0)
    weights_V = np.exp(gap_V / -np.float32(max(options.temperature, 1e-30)))
    order = np.lexsort((np.arange(len(gap_V)), gap_V))
    if options.typical_p < 1:
        ids = order[weights_V[order] > 0]
        p = weights_V[ids].astype(np.float64) / weights_V[ids].sum(dtype=np.float64)
        distance = np.abs(-np.log(p) + (p * np.log(p)).sum())
        by_distance = np.lexsort((ids, distance))
        before = np.cumsum(p[by_distance]) - p[by_distance]
        typical = set(ids[by_distance[: max(1, (before < options.typical_p).sum())]].tolist())
        order = np.array([i for i in order if i in typical])
    order = order[: options.top_k or None]
    weights = weights_V[order].astype(np.float64)
    cumulative = np.cumsum(weights)
    left = (cumulative - weights <= options.top_p * cumulative[-1]) & (weights >= options.min_p * weights[0])
    left &= weights > 0
    return order[left], weights[left]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_draws_are_those_of_the_rules_one_after_the_other(data: st.DataObject) -> None:
    """Few and many tokens, ties, tokens that are ruled out, every combination of options."""
    vocabulary = data.draw(st.sampled_from([1, 2, 5, 64, 300, 1500]))
    seed, step = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([0.0, 0.25, 4.0]))
    logits_V = logits(1, vocabulary, seed, data.draw(st.sampled_from([0.0, 1.0, 5.0])))[0]
    if step:
        logits_V = np.round(logits_V / step).astype(np.float32) * np.float32(step)  # ties, and zeros of both signs
    logits_V[np.random.default_rng(seed).random(vocabulary) < data.draw(st.sampled_from([0.0, 0.5, 0.98]))] = -np.inf
    logits_V[seed % vocabulary] = 1.0
    options = Sampling(
        temperature=data.draw(st.sampled_from([1e-300, 1e-3, 0.6, 1.0, 3.0, 1e6])),
        top_k=data.draw(st.sampled_from([0, 0, 1, 40, 2000])),
        top_p=data.draw(st.sampled_from([0.0, 0.5, 0.9, 0.9999999, 1.0])),
        min_p=data.draw(st.sampled_from([0.0, 0.0, 0.05, 1.0])),
        typical_p=data.draw(st.sampled_from([1.0, 1.0, 0.0, 0.3, 0.95])),
    )
    ids, weights = kept_by_the_rules(logits_V, options)
    ends = dict(zip(ids.tolist(), np.cumsum(weights / weights.sum()), strict=True))
    shares = dict(zip(ids.tolist(), weights / weights.sum(), strict=True))
    ordered = options.top_p < 1 or 0 < options.top_k < vocabulary
    for number in range(20):
        state = SamplerRow(options, number)
        u = uniform(number, 0)
        token_id = sample(logits_V[None], [state])[0].token_id
        assert token_id in shares
        if ordered:
            assert ends[token_id] - shares[token_id] - 1e-6 <= u <= ends[token_id] + 1e-6


def test_zeros_of_both_signs_are_alike() -> None:
    both = np.array([[-0.0, 0.0, -5.0]], np.float32)
    picks = [sample(both, [row(seed=s, temperature=1.0, top_p=0.5)])[0].token_id for s in range(200)]
    assert 60 < picks.count(0) < 140 and picks.count(0) + picks.count(1) == 200


def test_penalties_equal_transformers_and_the_openai_formula() -> None:
    import torch
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits_BV = logits(1, 100, 5)
    prompt, generated = (3, 4, 5, 5), [7, 7, 8]
    state = row(prompt=prompt, repetition_penalty=1.3, temperature=0.0)
    for token_id in generated:
        state.commit(token_id)
    mine = state.modified(logits_BV[0])
    ids = torch.tensor([[*prompt, *generated]])
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(ids, torch.from_numpy(logits_BV.copy()))[0].numpy()
    np.testing.assert_allclose(mine, theirs, rtol=1e-6)

    state = row(prompt=prompt, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: 2.0, 7: -1.0})
    for token_id in generated:
        state.commit(token_id)
    mine = state.modified(logits_BV[0])
    expected = logits_BV[0].copy()
    expected[7] -= 0.5 + 2 * 0.25 + 1.0
    expected[8] -= 0.5 + 0.25
    expected[9] += 2.0
    np.testing.assert_allclose(mine, expected, rtol=1e-6)


OPTIONS = [
    {"temperature": 0.0},
    {},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 1.5, "top_k": 7, "top_p": 1.0},
    {"temperature": 2.0, "top_p": 0.97, "min_p": 0.01},
    {"temperature": 4.0, "top_k": 300, "top_p": 0.9},
    {"temperature": 0.7, "repetition_penalty": 1.2},
    {"temperature": 1.0, "presence_penalty": 0.6, "frequency_penalty": 0.3},
    {"temperature": 1.0, "logit_bias": {1: 5.0}, "top_logprobs": 3},
    {"temperature": 1.5, "typical_p": 0.7, "top_k": 5, "min_p": 0.1},
]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), vocabulary=st.sampled_from([17, 255, 256, 257, 1031]))
def test_a_row_decides_the_same_alone_and_in_any_crowd(data: st.DataObject, vocabulary: int) -> None:
    """Same logits, options, seed and step: same token and log-probabilities, in any batch and order."""
    n = data.draw(st.integers(1, 24))
    picks = data.draw(st.lists(st.sampled_from(range(len(OPTIONS))), min_size=n, max_size=n))
    seeds = data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=n, max_size=n))
    steps = data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    logits_BV = logits(n, vocabulary, seed=n, scale=2.0)

    def make(b: int) -> SamplerRow:
        state = row(seeds[b], (0, 2, 3), **OPTIONS[picks[b]])
        for token_id in range(steps[b]):
            state.commit(token_id % vocabulary)
        return state

    order = data.draw(st.permutations(range(n)))
    crowd = sample(logits_BV[order], [make(b) for b in order])
    for b, choice in zip(order, crowd, strict=True):
        assert sample(logits_BV[b : b + 1], [make(b)]) == [choice]


@pytest.mark.parametrize("vocabulary", [300, 4096, 9001])
@pytest.mark.parametrize("options", OPTIONS)
def test_rows_that_are_taken_together_decide_as_alone(options: dict[str, object], vocabulary: int) -> None:
    """Peaked and flat ones, with ties, and with few tokens that are possible; more than fit into one part."""
    logits_BV = logits(30, vocabulary, seed=vocabulary) * np.tile(np.float32([0.02, 0.5, 1, 2, 5]), 6)[:, None]
    logits_BV[::4] = np.round(logits_BV[::4])
    logits_BV[3::9, 7:] = -np.inf
    together = sample(logits_BV, [row(b, (0, 2, 3), **options) for b in range(30)])
    for b, choice in enumerate(together):
        assert sample(logits_BV[b : b + 1], [row(b, (0, 2, 3), **options)]) == [choice]


def test_ties_and_extremes() -> None:
    flat = np.zeros((1, 1000), np.float32)
    assert sample(flat, [row(temperature=0.0)])[0].token_id == 0
    assert sample(flat, [row(top_k=1)])[0].token_id == sample(flat, [row(seed=5, top_k=1)])[0].token_id
    picks = {sample(flat, [row(seed=s, temperature=1.0, top_p=1.0)])[0].token_id for s in range(300)}
    assert len(picks) > 200  # uniform over 1000
    peak = np.full((1, 1000), -1e4, np.float32)
    peak[0, 321] = 1e4
    for options in OPTIONS[:6]:
        assert sample(peak, [row(**options)])[0].token_id == 321
    assert sample(logits(1, 50), [row(temperature=1e-6)])[0].token_id == logits(1, 50)[0].argmax()
    banned = logits(1, 50)
    banned[0, 10:] = -np.inf
    assert all(sample(banned, [row(seed=s, temperature=50.0)])[0].token_id < 10 for s in range(100))


def test_broken_logits_are_an_error() -> None:
    """It names the rows, and nothing is chosen for the others."""
    for number in (np.nan, np.inf):
        broken = logits(3, 50)
        broken[1, 3] = number
        for options in ({"temperature": 0.0}, {}, {"temperature": 1.0, "top_p": 1.0}):
            rows = [row(**options) for _ in range(3)]
            with pytest.raises(BrokenLogits, match="not numbers") as caught:
                sample(broken, rows)
            assert caught.value.rows == [1] and [state.n_generated for state in rows] == [0, 0, 0]


def test_penalties_do_not_break_large_logits() -> None:
    for penalty in (0.01, 100.0):
        for size in (1e37, 3e38, -3e38):
            state = row(prompt=(0,), repetition_penalty=penalty, temperature=0.0)
            assert sample(np.array([[size, 1, 2]], np.float32), [state])[0].token_id == (0 if size > 0 else 2)


@pytest.mark.parametrize("wanted", [1, 2, 3, 20])
def test_top_logprobs_go_by_the_logits_themselves(wanted: int) -> None:
    """Also where their gaps to the best are the same number, and where fewer tokens are there."""
    close = np.array([[20, 1e-7, 2e-7, -3]], np.float32)
    top = sample(close, [row(temperature=0.0, top_logprobs=wanted)])[0].top_logprobs
    assert top is not None and [i for i, _ in top] == [0, 2, 1, 3][:wanted]


def test_logprobs_are_the_models_own() -> None:
    """Log-probabilities do not depend on temperature or penalties: they are the model's, as training computes them."""
    import torch

    logits_BV = logits(2, 500, 3)
    rows = [row(temperature=0.1, top_logprobs=5), row(temperature=0.0, logprobs=True, logit_bias={4: 50.0})]
    choices = sample(logits_BV, rows)
    expected = torch.log_softmax(torch.from_numpy(logits_BV).double(), dim=-1)
    for b, choice in enumerate(choices):
        assert choice.logprob == pytest.approx(expected[b, choice.token_id].item(), abs=1e-9)
    assert choices[1].token_id == 4
    values, ids = expected[0].topk(5)
    assert choices[0].top_logprobs is not None
    assert [i for i, _ in choices[0].top_logprobs] == ids.tolist()
    assert [p for _, p in choices[0].top_logprobs] == pytest.approx(values.tolist())


def test_every_token_gets_a_fresh_random_number() -> None:
    """Token i of a request uses random number i: over a flat distribution the tokens are spread evenly."""
    state = row(seed=4, temperature=1.0, top_p=1.0)
    ids = [sample(np.zeros((1, 16), np.float32), [state])[0].token_id for _ in range(800)]
    counts = np.bincount(ids, minlength=16)
    assert ((counts - 50) ** 2 / 50).sum() < 45  # chi-square, 15 degrees of freedom


def test_random_numbers_are_splitmix64_and_uniform() -> None:
    """Published SplitMix64 outputs for state 1234567 (Vigna's splitmix64.c), then evenness and independence."""

    def reference(state: int) -> int:
        mask = 2**64 - 1
        z = (state + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert reference(1234567) == 6457827717110365317
    seed, counter = 99, 12
    state = (reference(seed) + counter * 0x9E3779B97F4A7C15) & (2**64 - 1)
    assert uniform(seed, counter) == (reference(state) >> 11) * 2.0**-53

    u = np.array([[uniform(seed, counter) for counter in range(400)] for seed in range(400)])
    assert u.min() >= 0 and u.max() < 1
    counts, _ = np.histogram(u, bins=100, range=(0, 1))
    chi2 = ((counts - 1600) ** 2 / 1600).sum()
    assert chi2 < 160  # 99 degrees of freedom
    for other in (u[:, 1:], u[1:]):
        same = u[:, :-1] if other.shape == u[:, :-1].shape else u[:-1]
        assert abs(np.corrcoef(same.ravel(), other.ravel())[0, 1]) < 0.01


def test_folded_seeds() -> None:
    seeds = [fold_seed(7, j) for j in range(1000)]
    assert seeds[0] == 7 and len(set(seeds)) == 1000 and all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("vocabulary", [50, 3001])
@pytest.mark.parametrize("mass", [0.0, 0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_typical_tokens_equal_transformers(vocabulary: int, mass: float, temperature: float) -> None:
    """Tokens of typical surprise (arXiv 2202.00666), and draws in proportion among them."""
    import torch
    from transformers import TypicalLogitsWarper

    logits_V = logits(1, vocabulary, seed=vocabulary)[0]
    warper = TypicalLogitsWarper(mass=max(mass, 1e-6))
    scores = warper(None, torch.from_numpy(logits_V / np.float32(temperature))[None])
    kept = set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())
    n = 2000
    options = Sampling(temperature=temperature, typical_p=mass, top_p=1.0)
    rows = [SamplerRow(options, seed, ()) for seed in range(n)]
    ids = [choice.token_id for choice in sample(np.repeat(logits_V[None], n, axis=0), rows)]
    assert set(ids) <= kept
    p = np.exp(log_softmax(logits_V[None] / temperature)[0][sorted(kept)])
    p /= p.sum()
    counts = np.bincount(ids, minlength=vocabulary)[sorted(kept)]
    assert np.all(np.abs(counts - n * p) < 5 * np.sqrt(n * p * (1 - p)) + 3)
