"""`herd scaling run`: train a ladder, rung by rung."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from herd.cli.options import takes_groups
from herd.cli.output import console, emit, table
from herd.cli.scaling import Budgets, Overrides, Recipe, Sizes

if TYPE_CHECKING:
    from herd.pretrain.scaling import Rung

_MOST_EPOCHS = 4


@takes_groups
def command(
    recipe: Recipe = "pocket",
    overrides: Overrides = None,
    *,
    budgets: Budgets,
    out: Annotated[Path | None, typer.Option(help="The run directory.  [default: runs/NAME-ladder]")] = None,
    around: Sizes,
    as_json: Annotated[bool, typer.Option("--json", help="Print the finished runs as JSON.")] = False,
) -> int:
    """Train every model of a ladder and write ladder.jsonl, the table that `herd scaling fit` reads.

    The recipe's corpus and tokenizer stages run once, its base stage once for every model, with that model's shape,
    batch and steps; other stages are left out. The loss is that of all held-out text. What is done is skipped, so the
    same command continues after Ctrl-C or a crash.

    Examples:

        herd scaling run --budgets 1e13,3e13,1e14 --sizes 4

        herd scaling run recipes/pocket.yaml 'corpus.sources=[notes]' --budgets 1e13,1e14 --out runs/notes-ladder
    """
    from herd.recipe import load_recipe, stage_table
    from herd.recipe.ladder import LADDER_FILE, run_ladder

    loaded, config = load_recipe(recipe, overrides or []), around.config(budgets)
    run_dir = out or Path("runs") / f"{loaded.name}-ladder"
    options = [f"--{name}={getattr(around, name)}" for name in ("sizes", "ratio", "spread")]
    options.insert(0, f"--budgets={budgets}")
    again = shlex.join(["herd", "scaling", "run", loaded.source, *loaded.overrides, *options, "--out", str(run_dir)])
    try:
        rows = run_ladder(loaded, config, stage_table(), run_dir, command=again, on_rung=_say)
    except (KeyboardInterrupt, SystemExit) as stop:
        console().print(f"Stopped. {again} continues where it was.", markup=False, soft_wrap=True)
        return 130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
    emit(rows, as_json, lambda: print(_text(rows, run_dir / LADDER_FILE)))
    return 0


def _say(rung: Rung, row: dict[str, Any] | None) -> None:
    from herd.progress import status

    status("")
    if row is None:
        console().print(f"▸ {rung.name}  {rung.steps:,} steps", style="cyan", markup=False)
        return
    console().print(f"✓ {rung.name}  loss {row['loss']:.4f}", style="green", markup=False)
    if row["epochs"] > _MOST_EPOCHS:
        warning = (
            f"! it has read the corpus {row['epochs']:.1f} times: its loss says more about repetition than about size"
        )
        console().print(warning, style="yellow", markup=False, soft_wrap=True)


def _text(rows: list[dict[str, Any]], file: Path) -> str:
    from herd.recipe.units import count, duration

    lines = [
        [
            row["name"],
            f"{row['flops']:.3g}",
            count(row["params"]),
            count(row["tokens"]),
            f"{row['epochs']:.2f}",
            f"{row['loss']:.4f}",
            duration(row["seconds"]),
        ]
        for row in rows
    ]
    headings = ["run", "FLOPs", "params", "tokens", "epochs", "loss", "time"]
    return f"{table(headings, lines)}\nherd scaling fit {shlex.quote(str(file))}"
