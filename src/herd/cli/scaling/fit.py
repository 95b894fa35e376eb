"""`herd scaling fit`: the laws behind a ladder of trained models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from herd.cli.options import takes_groups
from herd.cli.output import emit, table
from herd.cli.scaling import Bootstrap, between, check_writable, no_floor

if TYPE_CHECKING:
    from herd.pretrain.scaling import LadderFit


@takes_groups
def command(
    ladder: Annotated[
        Path, typer.Argument(help="A table (*.jsonl, *.csv) with the columns flops, params, tokens, loss.")
    ],
    *,
    bootstrap: Bootstrap,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the IsoFLOP curves and the law.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the fit as JSON.")] = False,
) -> None:
    """Fit IsoFLOP curves: the best tokens and parameters for a compute budget, and the loss they reach.

    Runs with about the same FLOPs are one budget. Its loss is a parabola in log tokens, whose minimum is the best
    size; over the budgets the minima give tokens = A · C^α, the same for parameters, and loss = E + B · C^-β.
    A budget counts if it has three sizes and its minimum lies between them; the others are shown with the reason.

    Examples:

        herd scaling fit ladder.jsonl

        herd scaling fit runs/pocket-ladder/ladder.jsonl --plot isoflop.png

        herd scaling fit ladder.csv --confidence 0.9 --json
    """
    from herd.pretrain.scaling import fit_ladder, plot_ladder, read_runs

    check_writable("--plot", plot)
    fit = fit_ladder(read_runs(ladder), **bootstrap.arguments())
    if plot is not None:
        plot_ladder(fit, plot)
    emit(fit.to_dict(), as_json, lambda: print(_text(fit, plot)))


def _text(fit: LadderFit, plot: Path | None) -> str:
    from herd.recipe.units import count

    rows = [
        [
            f"{budget.flops:.3g}",
            len(budget.runs),
            *(
                (count(budget.tokens), count(budget.params), f"{budget.loss:.4f}", "")
                if budget.unused is None
                else ("", "", "", f"not used: {budget.unused}")
            ),
        ]
        for budget in fit.budgets
    ]
    minima = table(["FLOPs", "runs", "best tokens", "best params", "loss", ""], rows)
    laws = [
        ["tokens", "A · C^α", between(fit.factor("tokens")), between(fit.exponent("tokens"), 4), ""],
        ["params", "A · C^α", between(fit.factor("params")), between(fit.exponent("params"), 4), ""],
        [
            "loss",
            "E + B · C^-β",
            between(fit.factor("loss")),
            between(fit.exponent("loss"), 4),
            f"E = {between(fit.floor(), 4) if fit.has_floor else '0, not fitted'}",
        ],
    ]
    parts = [minima, table(["law", "form", "factor", "exponent", ""], laws)]
    usable = int(fit.to_dict()["usable_resamples"])
    if not usable:
        parts.append("no intervals: three runs a budget lie on their parabola exactly; train a fourth size")
    else:
        parts.append(f"{fit.confidence:.0%} intervals from {usable:,} resamples, seed {fit.seed}")
    if not fit.has_floor:
        parts[-1] += f"\n{no_floor()}"
    return "\n\n".join(parts) + (f"\npicture: {plot}" if plot else "")
