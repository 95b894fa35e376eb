"""loss.png: the loss curves of a run as one picture, for a README. Needs matplotlib, which `[train]` brings."""

from __future__ import annotations

import io
from pathlib import Path

from herd.errors import MissingDependency
from herd.files import atomic_write
from herd.recipe.report.charts import smooth
from herd.recipe.report.data import RunData

_INK, _MUTED, _LINE = "#1d1c1a", "#68655d", "#e4e1d9"
_TRAIN, _HELDOUT = "#2b5fd3", "#c2561a"
_NAMES = {"base": "pretraining", "sft": "instruction tuning"}


def write_picture(run: RunData, path: Path) -> bool:
    """Draw the loss of every training stage side by side. False when no stage has one. Raises MissingDependency."""
    stages = [(name, training) for name, training in run.training.items() if len(training.curve("loss")) > 1]
    if not stages:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency("matplotlib", extra="train") from None
    widths = [2.0 if name == "base" else 1.0 for name, _ in stages]
    figure = Figure(figsize=(9.6 if len(stages) > 1 else 7.2, 3.9), dpi=150, facecolor="white", layout="constrained")
    grid = figure.add_gridspec(1, len(stages), width_ratios=widths)
    for column, (name, training) in enumerate(stages):
        axes = figure.add_subplot(grid[0, column])
        loss, heldout = training.curve("loss"), training.curve("heldout_loss")
        axes.plot(*zip(*loss, strict=True), color=_TRAIN, alpha=0.28, linewidth=0.8)
        axes.plot(*zip(*smooth(loss), strict=True), color=_TRAIN, linewidth=1.8, label="training")
        if heldout:
            axes.plot(
                *zip(*heldout, strict=True), "o-", color=_HELDOUT, linewidth=1.6, markersize=3.5, label="held-out"
            )
        _tidy(axes, f"{run.name}: {_NAMES.get(name, name)}")
        if column == 0:
            axes.set_ylabel("loss, nats per token", color=_MUTED)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "Herd"})
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
    return True


def _tidy(axes: object, title: str) -> None:
    """Quiet axes: no box, faint horizontal lines, the legend without a frame."""
    axes.set_title(title, loc="left", fontsize=11, color=_INK)  # type: ignore[attr-defined]
    axes.set_xlabel("step", color=_MUTED)  # type: ignore[attr-defined]
    axes.grid(axis="y", color=_LINE, linewidth=0.8)  # type: ignore[attr-defined]
    axes.tick_params(colors=_MUTED, length=0)  # type: ignore[attr-defined]
    for spine in axes.spines.values():  # type: ignore[attr-defined]
        spine.set_visible(False)
    axes.legend(frameon=False, labelcolor=_INK)  # type: ignore[attr-defined]
