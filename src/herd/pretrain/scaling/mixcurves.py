"""The losses of mixes at the wanted FLOPs, each from its own curve E + B·C^-β over the budgets it was trained at."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from herd.pretrain.scaling.isoflop import FLOOR_BUDGETS, SAME_BUDGET
from herd.pretrain.scaling.laws import lines, loss_curves
from herd.pretrain.scaling.mixes import MixRun


@dataclass(frozen=True)
class Mix:
    """A mix of the table. `losses` and what the laws say, `fitted`, are those at the wanted FLOPs; both are empty where
    `unused` says why the mix does not count."""

    weights: Mapping[str, float]
    runs: int
    budgets: int
    losses: Mapping[str, float]
    fitted: Mapping[str, float]
    unused: str | None


def mixes_at(runs: Sequence[MixRun], flops: float) -> list[Mix]:
    """The mixes in the order in which they are first met, with their losses at the wanted FLOPs.

    Runs at two budgets or more give a curve, with E = 0 for two. Of a mix that was trained at one budget, which must be
    the wanted one, each run stands by itself.
    """
    return [mix for group in _grouped(runs) for mix in _at(group, flops)]


def _grouped(runs: Sequence[MixRun]) -> list[list[MixRun]]:
    """The runs of each mix, in the order in which mixes are first met."""
    groups: dict[tuple[float, ...], list[MixRun]] = {}
    for run in runs:
        groups.setdefault(tuple(round(run.weights[name], 4) for name in runs[0].weights), []).append(run)
    return list(groups.values())


def _at(runs: Sequence[MixRun], flops: float) -> list[Mix]:
    weights, ordered = runs[0].weights, sorted(run.flops for run in runs)
    budgets = 1 + sum(b >= a * SAME_BUDGET for a, b in itertools.pairwise(ordered))
    if budgets == 1:
        if max(flops, ordered[-1]) < min(flops, ordered[0]) * SAME_BUDGET:
            return [Mix(weights, 1, 1, run.losses, {}, None) for run in runs]
        return [Mix(weights, len(runs), budgets, {}, {}, f"trained at {ordered[0]:.3g} FLOPs alone")]
    x, losses = np.log([run.flops for run in runs]), {}
    for name in runs[0].losses:
        y = np.array([[run.losses[name] for run in runs]])
        level, log_factor, exponent = (float(v[0]) for v in loss_curves(x, y, floor=budgets >= FLOOR_BUDGETS))
        losses[name] = level + float(np.exp(log_factor - exponent * np.log(flops)))
        if not (lines(x, y)[1][0] < 0 and np.isfinite(losses[name])):
            return [Mix(weights, len(runs), budgets, {}, {}, f"its loss of {name} does not fall with compute")]
    return [Mix(weights, len(runs), budgets, losses, {}, None)]
