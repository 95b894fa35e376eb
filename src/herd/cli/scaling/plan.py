"""`herd scaling plan`: which models to train for a ladder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from herd.cli.options import takes_groups
from herd.cli.output import emit, table
from herd.cli.scaling import Budgets, Overrides, Recipe, Sizes

if TYPE_CHECKING:
    from herd.pretrain.scaling import Rung


@takes_groups
def command(
    recipe: Recipe = "pocket",
    overrides: Overrides = None,
    *,
    budgets: Budgets,
    around: Sizes,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ladder as JSON, with each run's recipe.")] = False,
) -> None:
    """List the models of an IsoFLOP ladder: shapes, tokens and steps that spend each budget. Trains nothing.

    Width, depth and heads follow one rule (docs/scaling.md); tokens are the budget over the architecture's exact
    FLOPs per token. Vocabulary, context, rows and learning rates come from the recipe.

    Examples:

        herd scaling plan --budgets 1e15,3e15,1e16 --sizes 4

        herd scaling plan recipes/pocket.yaml tokenizer.vocab_size=512 --budgets 1e13,3e13 --json
    """
    from herd.recipe import load_recipe
    from herd.recipe.ladder import plan_ladder, rung_recipe

    loaded = load_recipe(recipe, overrides or [])
    planned = plan_ladder(loaded, around.config(budgets))
    data = [rung.to_dict() | {"stages": dict(rung_recipe(loaded, rung).stages)} for rung in planned]
    emit(data, as_json, lambda: print(rung_table(planned)))


def rung_table(rungs: list[Rung]) -> str:
    """The rungs as text, with all their FLOPs below."""
    from herd.recipe.units import count

    rows = [
        [
            f"{rung.budget:.3g}",
            rung.shape.dim,
            rung.shape.n_layers,
            rung.shape.n_heads,
            rung.shape.ffn_dim,
            count(rung.params),
            count(rung.tokens),
            f"{rung.tokens / rung.weights:.1f}",
            f"{rung.batch_size} × {rung.seq_len}",
            f"{rung.steps:,}",
        ]
        for rung in rungs
    ]
    headings = ["FLOPs", "dim", "layers", "heads", "ffn", "params", "tokens", "per weight", "batch", "steps"]
    total = sum(rung.flops for rung in rungs)
    return f"{table(headings, rows)}\n{len(rungs)} runs, {total:.3g} FLOPs"
