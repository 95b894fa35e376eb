"""The mixing law: a domain's held-out loss as a function of the shares of the sources that a model was trained on.

L(r) = c + k · exp(Σ_j t_j · r_j), with c ≥ 0 and k > 0: Ye et al., Data Mixing Laws, arXiv 2403.16952. Shares sum to 1,
so only u_j = ln k + t_j is determined: L = c + exp(Σ_j u_j · r_j), where c + exp(u_j) is the loss after training on
source j alone. k and t are told apart by Σ_j t_j = 0.

Letters: R replicates, n mixes, M sources, P numbers of a law.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from herd.pretrain.scaling.laws import Array

_GRIDS = (16, 8)
"""Floors that are tried at once: first over the whole range, then around the best of them."""
_ABOVE = 0.2
"""The highest floor that is tried: so far above the lowest loss, as a share of the way to the mean loss."""
_INNER, _LAST = 6, 60
"""Steps of the search at a given floor, and of the last one, of floor and u together."""
_HIGHEST = 50.0
"""Exponents are cut off here, where a loss would be e^50 nats."""
_TOGETHER = 256
"""Replicates that are fitted in one piece: more would leave the processor's cache."""


@dataclass(frozen=True)
class MixLaw:
    """floor + factor · exp(Σ slopes · shares) in nats per token; the slopes, one a source, sum to 0."""

    floor: float
    factor: float
    slopes: Mapping[str, float]

    def __call__(self, mix: Mapping[str, float]) -> float:
        return float(self.floor + self.factor * np.exp(sum(self.slopes[name] * mix[name] for name in self.slopes)))


def mix_laws(shares_nM: Array, loss_Rn: Array) -> tuple[Array, Array]:
    """Floors c ≥ 0 [R] and u [R, M] of the least-squares laws, in nats.

    The squares have a long curved valley: a law that bends little fits nearly as well with its floor far below. So the
    floor is searched over a grid, then over finer ones between the best point's neighbours, each with its best u; from
    the best both go down together. The shares need rank M, and n > M.
    """
    pieces = [_fitted(shares_nM, loss_Rn[i : i + _TOGETHER]) for i in range(0, len(loss_Rn), _TOGETHER)]
    return np.concatenate([floor for floor, _ in pieces]), np.concatenate([u for _, u in pieces])


def _fitted(shares_nM: Array, loss_Rn: Array) -> tuple[Array, Array]:
    rows, mean = np.arange(len(loss_Rn)), loss_Rn.mean(axis=1)
    near = np.maximum((1 - _ABOVE) * (mean - loss_Rn.min(axis=1)), 1e-9 * mean)
    far = mean
    for count in _GRIDS:
        grid = np.geomspace(near, far, count, axis=1)  # mean - floor: what a floor changes goes with its logarithm
        floors = np.maximum(mean[:, None] - grid, 0.0)
        each = np.repeat(loss_Rn, count, axis=0)
        floor, u, squares = _descend(shares_nM, each, floors.ravel(), _from_logs(shares_nM, each, floors.ravel()))
        best = squares.reshape(-1, count).argmin(axis=1)
        floor, u = floors[rows, best], u.reshape(len(rows), count, -1)[rows, best]
        near, far = grid[rows, np.maximum(best - 1, 0)], grid[rows, np.minimum(best + 1, count - 1)]
    floor, u, _ = _descend(shares_nM, loss_Rn, floor, u, free=True)
    return floor, u


def _from_logs(shares_nM: Array, loss_Rn: Array, floor_R: Array) -> Array:
    """u [R, M] of the regression of the logs, in which a loss weighs as much as it does in nats."""
    above = np.maximum(loss_Rn - floor_R[:, None], 1e-9)
    return _solve(above[:, :, None] * shares_nM, above * np.log(above), np.zeros(len(above)))


def _descend(
    shares_nM: Array, loss_Rn: Array, floor_R: Array, u_RM: Array, *, free: bool = False
) -> tuple[Array, Array, Array]:
    """Floors, u and sums of squares where Levenberg and Marquardt's damped Gauss-Newton steps lead.

    The floor is held, or `free` down to 0.
    """
    floor, u, damping = floor_R, u_RM, np.full(len(floor_R), 1e-6)
    height, square = _values(shares_nM, loss_Rn, floor, u)
    for _ in range(_LAST if free else _INNER):
        slopes = height[:, :, None] * shares_nM  # of the law by u; that by the floor is 1
        if free:
            slopes = np.concatenate([np.ones_like(slopes[:, :, :1]), slopes], axis=2)
        step = _solve(slopes, loss_Rn - floor[:, None] - height, damping)
        trial_floor, trial_u = (floor + step[:, 0], u + step[:, 1:]) if free else (floor, u + step)
        trial_height, trial_square = _values(shares_nM, loss_Rn, trial_floor, trial_u)
        better = (trial_square < square) & (trial_floor >= 0)
        floor, u = np.where(better, trial_floor, floor), np.where(better[:, None], trial_u, u)
        height, square = np.where(better[:, None], trial_height, height), np.where(better, trial_square, square)
        damping = np.where(better, damping / 10, np.maximum(damping * 100, 1e-4))
        if (damping > 1e6).all():
            break
    return floor, u, square


def _solve(slopes_RnP: Array, rest_Rn: Array, damping_R: Array) -> Array:
    """The damped least-squares solutions [R, P] of slopes · x = rest."""
    transposed = slopes_RnP.transpose(0, 2, 1)
    normal = transposed @ slopes_RnP
    at = np.arange(normal.shape[1])
    # So small an addition only matters where a source makes no difference any more.
    least = 1e-12 * normal[:, at, at].max(axis=1, keepdims=True) + 1e-300
    normal[:, at, at] += damping_R[:, None] * normal[:, at, at] + least
    return np.asarray(np.linalg.solve(normal, transposed @ rest_Rn[:, :, None])[:, :, 0])


def _values(shares: Array, loss: Array, floor: Array, u: Array) -> tuple[Array, Array]:
    """What the law adds to the floor [R, n], and the sums of squares [R]."""
    height = np.exp(np.minimum(u @ shares.T, _HIGHEST))
    return height, ((loss - floor[:, None] - height) ** 2).sum(axis=1)
