"""Least-squares laws over compute, for many bootstrap replicates at once.

Letters: R replicates, B budgets. A value that a replicate lacks is NaN and does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_SLOWEST, _FASTEST, _GRID = 1e-3, 2.0, 64
"""Exponents that a loss curve is tried with. Published ones lie between 0.05 and 0.5."""
_TOGETHER = 128
"""Replicates that are fitted in one piece: more would leave the processor's cache."""


@dataclass(frozen=True)
class PowerLaw:
    """factor · C^exponent, with C in FLOPs."""

    factor: float
    exponent: float

    def __call__(self, flops: float) -> float:
        return float(self.factor * flops**self.exponent)


@dataclass(frozen=True)
class LossLaw:
    """floor + factor · C^-exponent in nats per token, with C in FLOPs: what compute lowers, above what it cannot."""

    floor: float
    factor: float
    exponent: float

    def __call__(self, flops: float) -> float:
        return float(self.floor + self.factor * flops**-self.exponent)


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its interval; they are NaN where nothing tells how far off it may be."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, replicates: Array, confidence: float) -> Estimate:
        """The bootstrap's percentile interval."""
        usable = replicates[np.isfinite(replicates)]
        if not usable.size:
            return cls(value, np.nan, np.nan)
        tail = 50 * (1 - confidence)
        low, high = np.percentile(usable, [tail, 100 - tail])
        return cls(value, float(low), float(high))


def noise_scale(freedom: int, resamples: int, rng: np.random.Generator) -> Array:
    """A factor for the noise of each resample [R, 1], √(f / χ²_f) for residuals with f degrees of freedom.

    Few residuals do not tell how large the noise is. This widens the intervals of a normal distribution to Student's t.
    """
    return np.asarray(np.sqrt(freedom / rng.chisquare(freedom, (resamples, 1))))


def lines(x_B: Array, y_RB: Array) -> tuple[Array, Array]:
    """Intercepts and slopes [R] of the least-squares lines; NaN for a replicate of fewer than two values."""
    known = np.isfinite(y_RB)
    count = known.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_x = np.where(known, x_B, 0.0).sum(axis=1) / count
        mean_y = np.where(known, y_RB, 0.0).sum(axis=1) / count
        dx = np.where(known, x_B - mean_x[:, None], 0.0)
        slope = (dx * np.where(known, y_RB, 0.0)).sum(axis=1) / (dx**2).sum(axis=1)
    slope[count < 2] = np.nan
    return mean_y - slope * mean_x, slope


def loss_curves(log_flops_B: Array, loss_RB: Array, floor: bool) -> tuple[Array, Array, Array]:
    """Floors E ≥ 0, log factors ln B and exponents β [R] of E + B·C^-β, by least squares in nats.

    For a given β the curve is linear in E and B, so only β is searched: over a grid, then over a finer one between the
    best point's neighbours. Without `floor`, E is 0. NaN for a replicate of fewer values than the curve has numbers.
    """
    centre = log_flops_B.mean()  # of the fit alone: C^-β itself would leave the range of sensible numbers
    x = log_flops_B - centre
    pieces = [_search(x, loss_RB[i : i + _TOGETHER], floor) for i in range(0, len(loss_RB), _TOGETHER)]
    level, factor, exponent = np.concatenate(pieces, axis=1)
    usable = (np.isfinite(loss_RB).sum(axis=1) >= (3 if floor else 2)) & (factor > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        log_factor = np.log(factor) + exponent * centre
    return tuple(np.where(usable, values, np.nan) for values in (level, log_factor, exponent))  # type: ignore[return-value]


def _search(x: Array, loss_RB: Array, floor: bool) -> Array:
    """E, B and β [3, R] of the best curve."""
    known = np.isfinite(loss_RB)
    grid = np.broadcast_to(np.geomspace(_SLOWEST, _FASTEST, _GRID), (len(loss_RB), _GRID))
    rows = np.arange(len(loss_RB))
    for _ in range(3):
        squares, _, _ = _linear_part(x, loss_RB, known, grid, floor)
        best = squares.argmin(axis=1)
        low, high = grid[rows, np.maximum(best - 1, 0)], grid[rows, np.minimum(best + 1, _GRID - 1)]
        grid = np.geomspace(low, high, _GRID, axis=1)
    squares, floors, factors = _linear_part(x, loss_RB, known, grid, floor)
    best = squares.argmin(axis=1)
    return np.stack([floors[rows, best], factors[rows, best], grid[rows, best]])


def _linear_part(
    x_B: Array, y_RB: Array, known_RB: npt.NDArray[np.bool_], beta_RG: Array, floor: bool
) -> tuple[Array, Array, Array]:
    """Sums of squares, E and B for every exponent of a grid [R, G]."""
    weight = known_RB[:, None, :].astype(float)
    y = np.where(known_RB, y_RB, 0.0)[:, None, :]
    basis = np.exp(-beta_RG[:, :, None] * x_B)
    flat = (weight * basis * y).sum(-1) / np.maximum((weight * basis**2).sum(-1), 1e-300)
    level = np.zeros_like(flat)
    if floor:
        count = np.maximum(weight.sum(-1), 1.0)
        mean_basis, mean_y = (weight * basis).sum(-1) / count, y.sum(-1) / count
        off = weight * (basis - mean_basis[..., None])
        slope = (off * y).sum(-1) / np.maximum((off**2).sum(-1), 1e-300)
        free = mean_y - slope * mean_basis
        level, flat = np.where(free > 0, free, 0.0), np.where(free > 0, slope, flat)
    rest = weight * (y - level[..., None] - flat[..., None] * basis)
    return (rest**2).sum(-1), level, flat
