"""Mixing laws as one picture: how near they are to the runs, and the best mix with its intervals. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from herd.pretrain.scaling.mixfit import BestMix, MixFit
from herd.pretrain.scaling.plot import INK, LAW, MUTED, figure_of_two, tidy, write_png


def plot_mixes(fit: MixFit, best: BestMix, path: str | Path) -> None:
    """Write a PNG: each mix's loss as the laws have it over the measured one, a colour a domain, and the shares of the
    best mix over the mean of those that were trained. Raises MissingDependency.
    """
    figure, left, right = figure_of_two()
    _fitted(left, fit)
    tidy(left, f"losses at {fit.flops:.3g} FLOPs", "measured, nats per token", "the law")
    left.legend(frameon=False, labelcolor=INK, fontsize=8)
    _shares(right, fit, best)
    tidy(right, "the best mix", "", "share of the tokens")
    right.legend(frameon=False, labelcolor=INK, fontsize=8)
    write_png(figure, path)


def _fitted(axes: Any, fit: MixFit) -> None:
    import matplotlib

    colours = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.85, len(fit.laws)))
    every = [loss for mix in fit.used for loss in (*mix.losses.values(), *mix.fitted.values())]
    axes.plot([min(every), max(every)], [min(every), max(every)], color=MUTED, linewidth=0.8)
    for name, colour in zip(fit.laws, colours, strict=True):
        measured = [mix.losses[name] for mix in fit.used]
        axes.plot(measured, [mix.fitted[name] for mix in fit.used], "o", color=colour, markersize=4, label=name)


def _shares(axes: Any, fit: MixFit, best: BestMix) -> None:
    at = np.arange(len(fit.sources))
    values = np.array([estimate.value for estimate in best.weights.values()])
    ends = np.array([[estimate.low, estimate.high] for estimate in best.weights.values()]).T
    axes.bar(at, values, width=0.6, color=LAW, alpha=0.85, label="lowest loss")
    if np.isfinite(ends).all():
        axes.vlines(at, *ends, color=INK, linewidth=1.2, label=f"{fit.confidence:.0%} interval")
    trained = [np.mean([mix.weights[name] for mix in fit.used]) for name in fit.sources]
    axes.plot(at, trained, "_", color=MUTED, markersize=18, label="mean of the trained mixes")
    axes.set_xticks(at, fit.sources)
    axes.set_ylim(0, 1.3 * max(*values, *trained, np.nan_to_num(ends).max()))  # room for the legend
    axes.set_axisbelow(True)
