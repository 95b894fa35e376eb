"""Intervals and paired tests against brute force and published values."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest

from herd.errors import UsageError
from herd.evaluate import ci95, paired, proportion, wilson


def test_the_papers_interval() -> None:
    # 66.7 % on the 14,042 questions of MMLU: 1.96 · sqrt(0.667 · 0.333 / 14042)
    assert ci95(0.667, 14042) == pytest.approx(0.0077952, abs=1e-7)
    assert ci95(0.5, 100) == pytest.approx(0.098)
    assert ci95(0.0, 10) == ci95(1.0, 10) == 0.0


def test_the_interval_is_the_spread_of_the_mean() -> None:
    """1.96 standard deviations of the mean of n coin throws, from the binomial distribution summed out."""
    n, p = 12, 0.3
    weights = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    mean = sum(w * k / n for k, w in enumerate(weights))
    variance = sum(w * (k / n - mean) ** 2 for k, w in enumerate(weights))
    assert ci95(p, n) == pytest.approx(1.96 * math.sqrt(variance))


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (81, 263), (999, 1000)])
def test_wilson_bounds_are_the_roots_of_the_score_test(correct: int, n: int) -> None:
    low, high = wilson(correct, n)
    share = correct / n
    assert 0 <= low <= share <= high <= 1 and low < high
    for bound in {low, high} - {0.0, 1.0}:
        # Wilson's bounds are where |share - bound| is 1.96 standard errors *of the bound*.
        assert abs(share - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / n))


def test_wilson_published_example() -> None:
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I: 81/263 -> 0.2553 to 0.3662; 0/20 -> 0 to 0.1611
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_proportion_counts() -> None:
    score = proportion(3, 4)
    assert (score.correct, score.n, score.score) == (3, 4, 0.75)
    assert score.ci95 == ci95(0.75, 4) and (score.low, score.high) == wilson(3, 4)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 0), (5, 5), (9, 2), (1, 7), (12, 4)])
def test_mcnemar_against_all_sign_patterns(gained: int, lost: int) -> None:
    before = [False] * gained + [True] * lost + [True] * 3 + [False] * 2
    after = [True] * gained + [False] * lost + [True] * 3 + [False] * 2
    result = paired(before, after)
    assert (result.gained, result.lost, result.both_right, result.both_wrong) == (gained, lost, 3, 2)
    changed = gained + lost
    far = abs(gained - lost)
    # Every way the changed answers could have fallen, at least as far from balance as what was seen.
    as_far = sum(abs(2 * sum(signs) - changed) >= far for signs in itertools.product((0, 1), repeat=changed))
    assert result.p_value == pytest.approx(float(Fraction(as_far, 2**changed)))


def test_paired_difference_interval() -> None:
    before, after = [True] * 40 + [False] * 60, [True] * 30 + [False] * 10 + [True] * 25 + [False] * 35
    result = paired(before, after)
    differences = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
    mean = sum(differences) / 100
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / 100)
    assert result.difference == pytest.approx(mean) == pytest.approx(0.15)
    assert result.ci95 == pytest.approx(1.96 * spread / math.sqrt(100))


def test_large_comparisons_do_not_overflow() -> None:
    result = paired([False] * 20_000, [True] * 20_000)
    assert result.p_value == 0.0 and result.difference == 1.0


@pytest.mark.parametrize("call", [lambda: proportion(5, 4), lambda: proportion(0, 0), lambda: proportion(-1, 4)])
def test_impossible_counts(call) -> None:
    with pytest.raises(UsageError, match="allowed"):
        call()
    with pytest.raises(UsageError):
        paired([True], [True, False])
    with pytest.raises(UsageError):
        paired([], [])
    with pytest.raises(UsageError):
        ci95(1.5, 10)
