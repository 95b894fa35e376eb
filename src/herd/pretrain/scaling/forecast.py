"""The two-step forecast of a benchmark: compute → NLL of the right answer → accuracy.

Step one: the negative log-likelihood of the right answer, per character, falls linearly in log10 FLOPs over
compute-optimal models. Step two: accuracy is a sigmoid of that NLL over all models, also those of other ladders. The
Llama 3 Herd of Models, section 3.2.1, forecasts Llama 3 405B on ARC Challenge from models of 1e22 FLOPs and less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from herd.errors import UsageError
from herd.pretrain.scaling.isoflop import RESAMPLES, check_bootstrap, check_flops
from herd.pretrain.scaling.laws import Array, Estimate, lines, noise_scale
from herd.pretrain.scaling.table import Column, read_table

_COLUMNS = (
    Column("flops", 1.0, 1e40, needed=False),
    Column("nll", 0.0, 1e3),
    Column("accuracy", 0.0, 1.0, needed=False),
)
_ROUNDS = 60
_FLATTEST = 1e-6
"""A sigmoid that is flatter than this at every model is a step between them, of any steepness."""


@dataclass(frozen=True)
class Model:
    """A model's result. `nll`: nats per character of the right answer.

    `flops`: of its training, for a compute-optimal model, which counts for step one; else None. `accuracy`, 0 to 1,
    where it is known: the model counts for step two then.
    """

    flops: float | None
    nll: float
    accuracy: float | None


@dataclass(frozen=True)
class Forecast:
    """What a budget in FLOPs is expected to reach. `extrapolation`: as a multiple of the table's largest."""

    flops: float
    extrapolation: float
    nll: Estimate
    accuracy: Estimate


@dataclass(frozen=True)
class Benchmark:
    """nll = intercept + slope · log10 FLOPs; accuracy = chance + (ceiling - chance) · σ(-steepness · (nll - middle)).

    `replicates` [R, 4] has the four fitted numbers under every bootstrap resample, NaN where one could not be fitted.
    """

    intercept: float
    slope: float
    steepness: float
    middle: float
    chance: float
    ceiling: float
    largest: float
    replicates: Array
    confidence: float
    seed: int

    def accuracy(self, nll: float) -> float:
        """Step two alone."""
        return float(self._sigmoid(np.array([self.steepness]), np.array([self.middle]), np.array([nll]))[0])

    def forecast(self, flops: float) -> Forecast:
        """Both steps for a budget in FLOPs. The intervals are those of the two curves, not of a single model."""
        check_flops(flops)
        x = float(np.log10(flops))
        intercept, slope, steepness, middle = self.replicates.T
        nll, nlls = self.intercept + self.slope * x, intercept + slope * x
        return Forecast(
            flops=flops,
            extrapolation=flops / self.largest,
            nll=Estimate.of(nll, nlls, self.confidence),
            accuracy=Estimate.of(self.accuracy(nll), self._sigmoid(steepness, middle, nlls), self.confidence),
        )

    def _sigmoid(self, steepness: Array, middle: Array, nll: Array) -> Array:
        return self.chance + (self.ceiling - self.chance) * _sigma(steepness * (middle - nll))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the two curves with their intervals."""
        names = ("intercept", "slope", "steepness", "middle")
        curves = {
            name: asdict(Estimate.of(getattr(self, name), column, self.confidence))
            for name, column in zip(names, self.replicates.T, strict=True)
        }
        usable = int(np.isfinite(self.replicates).all(axis=1).sum())
        return {
            **curves,
            "chance": self.chance,
            "ceiling": self.ceiling,
            "confidence": self.confidence,
            "resamples": len(self.replicates),
            "usable_resamples": usable,
            "seed": self.seed,
        }


def read_models(path: str | Path) -> list[Model]:
    """The models of a table with the columns nll, flops and accuracy. Raises FileFormatError with line and field."""
    rows: Any = read_table(path, _COLUMNS)
    return [Model(**row) for row in rows]


def fit_benchmark(
    models: Sequence[Model],
    *,
    chance: float = 0.0,
    ceiling: float = 1.0,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Benchmark:
    """Fit both steps by least squares, with bootstrap intervals.

    Bootstrap: as for a ladder. Every model's value is drawn again, as its curve's value plus the residual of a random
    model, scaled by √(n / (n - 2)) for the two numbers of a curve and by `noise_scale`; both curves are fitted anew.

    `chance`: accuracy of guessing, 1/4 where there are four answers; `ceiling`: the highest there can be. Raises
    UsageError where a step has fewer than three different values, where no model is better than chance, and where the
    NLL rises with compute or with accuracy.
    """
    check_bootstrap(resamples, confidence)
    if not 0 <= chance < ceiling <= 1:
        raise UsageError(
            "chance and ceiling are no range", value=(chance, ceiling), allowed="0 <= chance < ceiling <= 1"
        )
    one = np.array([[np.log10(m.flops), m.nll] for m in models if m.flops is not None]).reshape(-1, 2)
    two = np.array([[m.nll, m.accuracy] for m in models if m.accuracy is not None]).reshape(-1, 2)
    for rows, name, what in ((one, "flops", "budgets"), (two, "accuracy", "NLLs")):
        if len(np.unique(rows[:, 0])) < 3:
            raise UsageError(
                f"too few different {what} among the models with {name}",
                value=len(np.unique(rows[:, 0])),
                allowed="three or more",
            )
    if not two[:, 1].max() > chance:
        raise UsageError("no model is better than chance", value=float(two[:, 1].max()), allowed=f"above {chance:g}")
    height, rng = ceiling - chance, np.random.default_rng(seed)
    x, nll = one.T
    intercept, slope = (float(numbers[0]) for numbers in lines(x, nll[None]))
    if not slope < 0:
        raise UsageError("the NLL does not fall with compute", value=slope, allowed="a slope below 0")
    z, share = two[:, 0], (two[:, 1] - chance) / height
    steepness, middle = (float(numbers[0]) for numbers in _sigmoids(z, share[None]))
    if not steepness > 0:
        raise UsageError("the accuracy does not rise as the NLL falls", value=steepness, allowed="a steepness above 0")
    drawn_nll = _redrawn(intercept + slope * x, nll, resamples, rng)
    drawn_share = _redrawn(_sigma(steepness * (middle - z)), share, resamples, rng)
    replicates = np.stack([*lines(x, drawn_nll), *_sigmoids(z, drawn_share)], axis=1)
    return Benchmark(
        intercept, slope, steepness, middle, chance, ceiling, float(10 ** x.max()), replicates, confidence, seed
    )


def _sigma(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))  # the logistic function, which overflows nowhere in this form


def _redrawn(fitted_n: Array, values_n: Array, resamples: int, rng: np.random.Generator) -> Array:
    n = len(values_n)
    residuals = (values_n - fitted_n) * np.sqrt(n / (n - 2))
    draws = rng.choice(residuals - residuals.mean(), (resamples, n))
    return np.asarray(fitted_n + noise_scale(n - 2, resamples, rng) * draws)


def _sigmoids(nll_n: Array, share_Rn: Array) -> tuple[Array, Array]:
    """Steepness k and middle m [R] of the least-squares curves σ(k·(m - nll)), by Levenberg and Marquardt's damped
    Gauss-Newton steps. NaN where the models do not bound the steepness: their accuracies are a step.
    """
    centre, spread = nll_n.mean(), nll_n.std()
    z = (nll_n - centre) / spread
    clipped = np.clip(share_Rn, 0.02, 0.98)
    p, q = lines(z, np.log(clipped / (1 - clipped)))  # of σ(p + q·z): the line through the logits is near the best
    damping = np.full(len(p), 1e-3)
    rest = share_Rn - _sigma(p[:, None] + q[:, None] * z)
    for _ in range(_ROUNDS):
        value = share_Rn - rest
        slope = value * (1 - value)  # the derivative by p; that by q is z times it
        pp, pq, qq = ((slope**2 * z**k).sum(axis=1) for k in range(3))
        to_p, to_q = ((slope * rest * z**k).sum(axis=1) for k in range(2))
        pp, qq = pp * (1 + damping), qq * (1 + damping)
        determinant = np.maximum(pp * qq - pq**2, 1e-300)
        trial_p, trial_q = p + (qq * to_p - pq * to_q) / determinant, q + (pp * to_q - pq * to_p) / determinant
        trial = share_Rn - _sigma(trial_p[:, None] + trial_q[:, None] * z)
        better = (trial**2).sum(axis=1) <= (rest**2).sum(axis=1)
        p, q = np.where(better, trial_p, p), np.where(better, trial_q, q)
        rest = np.where(better[:, None], trial, rest)
        damping = np.where(better, np.maximum(damping / 10, 1e-9), np.minimum(damping * 10, 1e9))
    value = share_Rn - rest
    q = np.where(((value * (1 - value)).max(axis=1) > _FLATTEST) & (q != 0), q, np.nan)
    return -q / spread, centre - spread * p / q
