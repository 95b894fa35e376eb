"""`herd scaling forecast`: a benchmark's accuracy from training compute, in the paper's two steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from herd.cli.options import takes_groups
from herd.cli.output import emit, table
from herd.cli.scaling import Bootstrap, between, flops_list

if TYPE_CHECKING:
    from herd.pretrain.scaling.forecast import Benchmark, Forecast


@takes_groups
def command(
    models: Annotated[Path, typer.Argument(help="A table (*.jsonl, *.csv) with the columns nll, flops, accuracy.")],
    *,
    bootstrap: Bootstrap,
    flops: Annotated[str, typer.Option(metavar="C,…", help="Training FLOPs to forecast for.")],
    chance: Annotated[float, typer.Option(help="Accuracy of guessing: 0.25 with four answers.")] = 0.0,
    ceiling: Annotated[float, typer.Option(help="The highest accuracy there can be.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the curves and forecasts as JSON.")] = False,
) -> None:
    """Forecast a benchmark: compute gives the NLL of the right answer, and the NLL gives the accuracy.

    A row is a model. nll: nats per character of the right answers. flops: for compute-optimal models only, whose NLL
    is a line in log FLOPs. accuracy, 0 to 1: for every model where it is known, of whatever family, a sigmoid of
    the NLL. Leave empty what a model does not have.

    Examples:

        herd scaling forecast arc.csv --flops 3.8e25 --chance 0.25

        herd scaling forecast arc.jsonl --flops 1e23,1e24 --confidence 0.9 --json
    """
    from herd.pretrain.scaling import fit_benchmark, read_models

    budgets = flops_list("--flops", flops)
    benchmark = fit_benchmark(read_models(models), chance=chance, ceiling=ceiling, **bootstrap.arguments())
    forecasts = [benchmark.forecast(budget) for budget in budgets]
    data = {"curves": benchmark.to_dict(), "forecasts": [dataclasses.asdict(forecast) for forecast in forecasts]}
    emit(data, as_json, lambda: print(_text(benchmark, forecasts)))


def _text(benchmark: Benchmark, forecasts: list[Forecast]) -> str:
    b = benchmark
    height = f"{b.chance:.3g} + {b.ceiling - b.chance:.3g}"
    rows = [[f"{f.flops:.3g}", between(f.nll, 4), between(f.accuracy, 4), f"{f.extrapolation:.3g}×"] for f in forecasts]
    return (
        f"nll       {b.intercept:.4g} - {-b.slope:.4g} · log10 FLOPs\n"
        f"accuracy  {height} · σ({b.steepness:.4g} · ({b.middle:.4g} - nll))\n\n"
        + table(["FLOPs", "nll", "accuracy", "largest budget"], rows)
    )
