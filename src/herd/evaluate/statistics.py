"""Intervals and paired tests for shares of right answers. Pure Python; every formula stands beside its source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from herd.errors import UsageError

Z95 = 1.96  # two-sided 95 % quantile of the normal distribution, rounded as the Llama 3 paper prints it


@dataclass(frozen=True, slots=True)
class Proportion:
    """`correct` of `n`. score = correct/n; ci95: half width of the paper's interval; low and high: Wilson's."""

    correct: int
    n: int
    score: float
    ci95: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Paired:
    """The same questions answered twice.

    gained: wrong before, right after; lost: the other way round. difference = score after - score before with the
    half width ci95 of its interval; p_value: McNemar's exact two-sided test of gains against losses."""

    n: int
    both_right: int
    both_wrong: int
    gained: int
    lost: int
    difference: float
    ci95: float
    p_value: float


def proportion(correct: int, n: int) -> Proportion:
    """Score with its intervals. Raises UsageError unless 0 <= correct <= n and n >= 1."""
    _check(correct, n)
    low, high = wilson(correct, n)
    return Proportion(correct, n, correct / n, ci95(correct / n, n), low, high)


def ci95(score: float, n: int) -> float:
    """Half width 1.96 · sqrt(S(1 - S)/N) of the 95 % interval of a score in [0, 1] over n questions.

    Source: The Llama 3 Herd of Models, section 5.1. It is 0 at S = 0 and S = 1; `wilson` is not."""
    if not (0 <= score <= 1 and n >= 1):
        raise UsageError("not a score over n questions", value=(score, n), allowed="0 <= score <= 1, n >= 1")
    return Z95 * math.sqrt(score * (1 - score) / n)


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % score interval: (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n).

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927), 209-212."""
    _check(correct, n)
    p, z2 = correct / n, Z95 * Z95
    centre = p + z2 / (2 * n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    scale = 1 + z2 / n
    low, high = (centre - half) / scale, (centre + half) / scale
    # At the ends the interval touches 0 and 1 exactly; rounding must not move it inside or out.
    return (0.0 if correct == 0 else low), (1.0 if correct == n else high)


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Compare two runs over the same questions in the same order.

    p_value = min(1, 2 · P[X <= min(gained, lost)]), X binomial over gained + lost with 1/2 (exact McNemar).
    ci95 = 1.96/n · sqrt(gained + lost - (gained - lost)²/n), the interval of a difference of paired shares.
    Source: Q. McNemar, Psychometrika 12 (1947), 153-157; A. Agresti, Categorical Data Analysis, 10.1."""
    if len(before) != len(after) or not before:
        raise UsageError(
            "a paired comparison needs the same questions twice",
            value=(len(before), len(after)),
            allowed="two equally long lists, not empty",
        )
    n = len(before)
    gained = sum(1 for old, new in zip(before, after, strict=True) if new and not old)
    lost = sum(1 for old, new in zip(before, after, strict=True) if old and not new)
    both = sum(1 for old, new in zip(before, after, strict=True) if old and new)
    return Paired(
        n=n,
        both_right=both,
        both_wrong=n - gained - lost - both,
        gained=gained,
        lost=lost,
        difference=(gained - lost) / n,
        ci95=Z95 / n * math.sqrt(gained + lost - (gained - lost) ** 2 / n),
        p_value=_sign_test(gained, lost),
    )


def _sign_test(gained: int, lost: int) -> float:
    changed = gained + lost
    tail = sum(math.comb(changed, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / (1 << changed))  # whole numbers until the last division, which Python rounds correctly


def _check(correct: int, n: int) -> None:
    if n < 1 or not 0 <= correct <= n:
        raise UsageError("not a count of right answers", value=(correct, n), allowed="0 <= correct <= n, n >= 1")
