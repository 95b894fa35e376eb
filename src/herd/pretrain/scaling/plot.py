"""A ladder as one picture: IsoFLOP curves with their minima, and the law through the minima. Needs matplotlib."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from herd.errors import MissingDependency
from herd.files import atomic_write
from herd.pretrain.scaling.isoflop import Budget, LadderFit

INK, MUTED, LINE, LAW = "#1d1c1a", "#68655d", "#e4e1d9", "#c2561a"


def plot_ladder(fit: LadderFit, path: str | Path) -> None:
    """Write a PNG: loss over tokens with a parabola a budget, and compute-optimal tokens over FLOPs with the law.

    A budget without a minimum that counts has its runs drawn and no parabola. Raises MissingDependency.
    """
    figure, left, right = figure_of_two()
    import matplotlib

    colours = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.85, len(fit.budgets)))
    for budget, colour in zip(fit.budgets, colours, strict=True):
        _curve(left, budget, colour)
    tidy(left, "IsoFLOP curves", "training tokens", "loss, nats per token")
    left.set_xscale("log")
    left.legend(frameon=False, labelcolor=INK, title="FLOPs", fontsize=8, title_fontsize=8)
    _law(right, fit)
    tidy(right, "compute-optimal tokens", "training FLOPs", "training tokens")
    right.set_xscale("log")
    right.set_yscale("log")
    right.legend(frameon=False, labelcolor=INK, fontsize=8)
    write_png(figure, path)


def figure_of_two() -> tuple[Any, Any, Any]:
    """An empty figure with two axes beside each other. Raises MissingDependency."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency("matplotlib", extra="train") from None
    figure = Figure(figsize=(10.4, 4.2), dpi=150, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    return figure, left, right


def tidy(axes: Any, title: str, x_label: str, y_label: str) -> None:
    """Title, labels and a quiet grid."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x_label, color=MUTED)
    axes.set_ylabel(y_label, color=MUTED)
    axes.grid(color=LINE, linewidth=0.8)
    axes.tick_params(which="both", colors=MUTED, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def write_png(figure: Any, path: str | Path) -> None:
    """Write a figure, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "Herd"})
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def _curve(axes: Any, budget: Budget, colour: Any) -> None:
    tokens = np.array([run.tokens for run in budget.runs])
    axes.plot(tokens, [run.loss for run in budget.runs], "o", color=colour, markersize=4, label=f"{budget.flops:.2g}")
    if budget.unused is None and budget.parabola is not None:
        along = np.geomspace(tokens.min(), tokens.max(), 200)
        axes.plot(along, np.polyval(budget.parabola, np.log(along)), color=colour, linewidth=1.2)
        axes.plot(budget.tokens, budget.loss, "D", color=LAW, markersize=5, zorder=3)


def _law(axes: Any, fit: LadderFit) -> None:
    flops = [budget.flops for budget in fit.used]
    along = np.geomspace(min(flops) / 2, max(flops) * 10, 60)  # a little beyond, where predictions are made
    predictions = [fit.predict(float(c)).tokens for c in along]
    label = f"{fit.tokens.factor:.3g} · C^{fit.tokens.exponent:.3f}"
    axes.plot(along, [p.value for p in predictions], color=LAW, linewidth=1.4, label=label)
    band = [p.low for p in predictions], [p.high for p in predictions]
    if np.isfinite(band).all():
        axes.fill_between(along, *band, color=LAW, alpha=0.15, linewidth=0, label=f"{fit.confidence:.0%} interval")
    axes.plot(flops, [budget.tokens for budget in fit.used], "D", color=LAW, markersize=5, label="minima")
