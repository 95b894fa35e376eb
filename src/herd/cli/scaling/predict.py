"""`herd scaling predict`: the best tokens, parameters and loss for a budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from herd.cli.options import takes_groups
from herd.cli.output import emit, table
from herd.cli.scaling import Bootstrap, counted, flops_list
from herd.errors import UsageError


@takes_groups
def command(
    ladder: Annotated[
        Path | None, typer.Argument(help="A table (*.jsonl, *.csv) with the columns flops, params, tokens, loss.")
    ] = None,
    *,
    flops: Annotated[str, typer.Option(metavar="C,…", help="Training FLOPs to predict for.")],
    bootstrap: Bootstrap,
    law: Annotated[
        str | None, typer.Option(metavar="A,ALPHA", help="Instead of a ladder: a published law, tokens = A · C^ALPHA.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the predictions as JSON.")] = False,
) -> None:
    """Predict the compute-optimal run of a budget, from a ladder or from a published law.

    The intervals are those of the laws, from a bootstrap over the ladder's runs: the loss of a single run scatters
    around them by its own noise, and no interval knows whether the law goes on that far. With --law the parameters
    are C / (6 · tokens), and there is no loss and no interval.

    Examples:

        herd scaling predict runs/pocket-ladder/ladder.jsonl --flops 1e17

        herd scaling predict ladder.csv --flops 1e22,3.8e25 --json

        herd scaling predict --law 0.299,0.537 --flops 3.8e25
    """
    budgets = flops_list("--flops", flops)
    if (ladder is None) == (law is None):
        raise UsageError("a prediction needs either a ladder or --law", fix="herd scaling predict LADDER --flops C")
    rows = _from_ladder(ladder, bootstrap, budgets) if ladder else _from_law(str(law), budgets)
    emit(rows, as_json, lambda: print(_text(rows)))


def _from_ladder(ladder: Path, bootstrap: Bootstrap, budgets: list[float]) -> list[dict[str, Any]]:
    from herd.pretrain.scaling import fit_ladder, read_runs

    fit = fit_ladder(read_runs(ladder), **bootstrap.arguments())
    return [dataclasses.asdict(fit.predict(budget)) for budget in budgets]


def _from_law(text: str, budgets: list[float]) -> list[dict[str, Any]]:
    from herd.pretrain.scaling import PowerLaw

    try:
        factor, exponent = (float(part) for part in text.split(","))
    except ValueError:
        factor = exponent = 0.0
    if not (0 < factor <= 1e40 and 0 < exponent <= 2):
        raise UsageError("--law is no pair A,ALPHA", value=text, allowed="A above 0 and ALPHA up to 2, as 0.299,0.537")
    rows = []
    for flops in budgets:
        tokens = PowerLaw(factor, exponent)(flops)
        alone = ({"value": value, "low": None, "high": None} for value in (tokens, flops / (6 * tokens)))
        rows.append({"flops": flops, **dict(zip(("tokens", "params"), alone, strict=True))})
    return rows


def _text(rows: list[dict[str, Any]]) -> str:
    from herd.cli.scaling import between, no_floor
    from herd.pretrain.scaling.isoflop import SAME_BUDGET
    from herd.pretrain.scaling.laws import Estimate

    def said(row: dict[str, Any], name: str, say: Any) -> str:
        if name not in row:
            return ""
        ends = {end: float("nan") if value is None else value for end, value in row[name].items()}
        return str(say(Estimate(**ends)))

    lines = [
        [
            f"{row['flops']:.3g}",
            said(row, "tokens", counted),
            said(row, "params", counted),
            said(row, "loss", lambda loss: between(loss, 4)),
            f"{row['extrapolation']:.3g}×" if "extrapolation" in row else "",
        ]
        for row in rows
    ]
    text = table(["FLOPs", "tokens", "params", "loss", "largest budget"], lines)
    low = any(not row.get("has_floor", True) and row["extrapolation"] > SAME_BUDGET for row in rows)
    return f"{text}\n{no_floor()}" if low else text
