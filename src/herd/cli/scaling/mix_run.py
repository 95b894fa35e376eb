"""`herd scaling mix-run`: train one model on several mixes of a recipe's sources."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from herd.cli.output import console, emit, table
from herd.cli.scaling import Overrides, Recipe, named_numbers

_MOST_EPOCHS = 4


def command(
    recipe: Recipe = "pocket",
    overrides: Overrides = None,
    *,
    mixes: Annotated[int, typer.Option(min=1, max=1000, help="Mixes to train, the recipe's own among them.")] = 8,
    least: Annotated[float, typer.Option(help="Smallest share of a source in the mixes that are chosen.")] = 0.05,
    mix: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE=SHARE,…", help="Train this mix, instead of chosen ones; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of mixes.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The run directory.  [default: runs/NAME-mixes]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the finished runs as JSON.")] = False,
) -> int:
    """Train a recipe's base stage on several mixes of its sources: mixes.jsonl, the table of `herd scaling mix`.

    The corpus and tokenizer stages run once, the base stage once for every mix, with the same model and steps and
    other weights in base.sources; other stages are left out. Each source's held-out text has a loss of its own. Mixes
    are chosen to lie far from each other. What is done is skipped, so the same command continues after a stop. For
    several budgets, run it once for each, with other steps and another --out, and put the tables together with cat.

    Examples:

        herd scaling mix-run recipes/mine.yaml --mixes 8

        herd scaling mix-run recipes/mine.yaml --mix code=0.7,prose=0.3 --mix code=0.2,prose=0.8

        herd scaling mix-run recipes/mine.yaml base.train.steps=2000 --out runs/mine-mixes-2000
    """
    from herd.pretrain.scaling import spread_mixes
    from herd.pretrain.scaling.mixes import checked_mix
    from herd.recipe import load_recipe, stage_table
    from herd.recipe.mixes import MIXES_FILE, own_mix, run_mixes

    loaded = load_recipe(recipe, overrides or [])
    own = own_mix(loaded)
    given = [checked_mix(dict.fromkeys(own, 0.0) | named_numbers("--mix", text, own)) for text in mix or []]
    chosen = given or spread_mixes(list(own), mixes, least=least, begin=[own], seed=seed)
    run_dir = out or Path("runs") / f"{loaded.name}-mixes"
    options = [f"--mix={text}" for text in mix or []] or [f"--mixes={mixes}", f"--least={least}", f"--seed={seed}"]
    again = shlex.join(
        ["herd", "scaling", "mix-run", loaded.source, *loaded.overrides, *options, "--out", str(run_dir)]
    )
    try:
        rows = run_mixes(loaded, chosen, stage_table(), run_dir, command=again, on_mix=_say)
    except (KeyboardInterrupt, SystemExit) as stop:
        console().print(f"Stopped. {again} continues where it was.", markup=False, soft_wrap=True)
        return 130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
    emit(rows, as_json, lambda: print(_text(rows, run_dir / MIXES_FILE)))
    return 0


def _say(number: int, mix: Mapping[str, float], row: dict[str, Any] | None) -> None:
    from herd.progress import status

    status("")
    name = " ".join(f"{source}={share:.3g}" for source, share in mix.items())
    if row is None:
        console().print(f"▸ mix {number}  {name}", style="cyan", markup=False)
        return
    losses = ", ".join(f"{domain} {loss:.4f}" for domain, loss in _part(row, "loss.").items())
    console().print(f"✓ mix {number}  {losses}", style="green", markup=False)
    read = {source: times for source, times in _part(row, "epochs.").items() if times > _MOST_EPOCHS}
    if read:
        said = ", ".join(f"{source} {times:.1f} times" for source, times in read.items())
        console().print(
            f"! it has read {said}: its loss says more about repetition than about the mix",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def _part(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def _text(rows: list[dict[str, Any]], file: Path) -> str:
    from herd.recipe.units import count, duration

    sources, domains = (list(_part(rows[0], prefix)) for prefix in ("weight.", "loss."))
    lines = [
        [
            *(f"{row['weight.' + source]:.3f}" for source in sources),
            f"{row['flops']:.3g}",
            count(row["tokens"]),
            *(f"{row['loss.' + domain]:.4f}" for domain in domains),
            duration(row["seconds"]),
        ]
        for row in rows
    ]
    headings = [*sources, "FLOPs", "tokens", *(f"loss of {domain}" for domain in domains), "time"]
    return f"{table(headings, lines)}\nherd scaling mix {shlex.quote(str(file))}"
