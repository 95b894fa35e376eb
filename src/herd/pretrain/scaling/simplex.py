"""The mix with the lowest loss: the minimum of a convex function over shares that sum to 1, within bounds.

A weighted sum of mixing laws is Σ_d w_d · exp(Σ_j u_dj · r_j) above its floors, which is convex in the shares r: there
is one lowest value. Newton's steps with logarithmic barriers at the bounds go to it (Boyd and Vandenberghe, Convex
Optimization, chapter 11).

Letters: R replicates, D domains, M sources.
"""

from __future__ import annotations

import numpy as np

from herd.pretrain.scaling.laws import Array

_BARRIERS = 10.0 ** -np.arange(1, 12)
"""Heights of the barriers, one after the other; the last costs 2·M·1e-11 of the height of the loss above its floors."""
_STEPS = 5
_HALVINGS = 30
_FIXED = 1e-9
"""A share whose bounds are nearer to each other than this has no choice."""


def lowest(u_RDM: Array, weights_D: Array, low_M: Array, high_M: Array) -> Array:
    """The shares [R, M] that minimise Σ_d weights_d · exp(Σ_j u_dj · r_j) with low ≤ r ≤ high and Σ r = 1.

    The bounds must leave such shares: Σ low ≤ 1 ≤ Σ high. Where a source makes no difference its share is somewhere
    between its bounds.
    """
    room = high_M - low_M
    inside = (1 - low_M.sum()) / max(room.sum(), _FIXED)
    shares = np.tile(low_M + np.clip(inside, 0, 1) * room, (len(u_RDM), 1))
    free = room > _FIXED
    if free.sum() < 2 or not _FIXED < inside < 1 - _FIXED:
        return shares
    height = np.log(weights_D, where=weights_D > 0, out=np.full(len(weights_D), -np.inf))
    height = height + (u_RDM[:, :, ~free] * shares[:, None, ~free]).sum(axis=2)  # [R, D]: what cannot be chosen
    problem = _Barrier(u_RDM[:, :, free], height, low_M[free], high_M[free], shares[:, free])
    for barrier in _BARRIERS:
        for _ in range(_STEPS):
            problem.step(barrier)
    shares[:, free] = problem.shares
    return shares


class _Barrier:
    """Shares strictly between their bounds, on their way to the minimum."""

    def __init__(self, u: Array, height: Array, low: Array, high: Array, shares: Array) -> None:
        self._u, self._low, self._high, self.shares = u, low, high, shares
        begin = height + (u @ shares[:, :, None])[:, :, 0]
        # Scaled to 1 where the search begins, so that a barrier means the same for every replicate.
        self._height = height - np.log(np.exp(begin - begin.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
        self._height -= begin.max(axis=1, keepdims=True)

    def step(self, barrier: float) -> None:
        """One damped step towards the minimum of the function with barriers of this height."""
        r, u = self.shares, self._u
        terms = self._terms(r)
        below, above = r - self._low, self._high - r
        gradient = (terms[:, :, None] * u).sum(axis=1) - barrier / below + barrier / above
        curve = (terms[:, :, None] * u).transpose(0, 2, 1) @ u
        diagonal = np.arange(r.shape[1])
        curve[:, diagonal, diagonal] += barrier / below**2 + barrier / above**2
        both = np.linalg.solve(curve, np.stack([gradient, np.ones_like(gradient)], axis=2))
        direction = both[:, :, 1] * (both[:, :, 0].sum(axis=1) / both[:, :, 1].sum(axis=1))[:, None] - both[:, :, 0]
        direction -= direction.mean(axis=1, keepdims=True)  # shares keep their sum, also after rounding
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(direction < 0, below / -direction, np.where(direction > 0, above / direction, np.inf))
        length = np.minimum(1.0, 0.95 * room.min(axis=1))
        value = self._value(r, barrier)
        for _ in range(_HALVINGS):
            trial = r + length[:, None] * direction
            worse = ~(self._value(trial, barrier) <= value)
            if not worse.any():
                break
            length = np.where(worse, length / 2, length)
        self.shares = np.where(worse[:, None], r, trial)

    def _terms(self, r: Array) -> Array:
        return np.asarray(np.exp(self._height + (self._u @ r[:, :, None])[:, :, 0]))

    def _value(self, r: Array, barrier: float) -> Array:
        walls = np.log(r - self._low).sum(axis=1) + np.log(self._high - r).sum(axis=1)
        return np.asarray(self._terms(r).sum(axis=1) - barrier * walls)
