"""Recipes: stages with hashed inputs → a run directory → a report and a model card.

    recipe = load_recipe("recipes/pocket.yaml", ["corpus.sources=[notes]"])
    state = run(recipe, stage_table(), "runs/pocket")

`stage_table` binds the stages to the rooms that do the work; it imports PyTorch. The report needs none of that.
"""

from __future__ import annotations

from herd.errors import MissingDependency
from herd.recipe.loading import Recipe, load_recipe
from herd.recipe.manifest import Decision
from herd.recipe.planning import Placed, place, preview
from herd.recipe.reference import FieldReference, reference, to_markdown
from herd.recipe.runner import StageEvent, StageFailed, read_run, run
from herd.recipe.stage import BoundStage, Stage, StageContext

__all__ = [
    "BoundStage",
    "Decision",
    "FieldReference",
    "Placed",
    "Recipe",
    "Stage",
    "StageContext",
    "StageEvent",
    "StageFailed",
    "load_recipe",
    "place",
    "preview",
    "read_run",
    "reference",
    "run",
    "stage_table",
    "to_markdown",
]


def stage_table() -> list[Stage]:
    """All stages that recipes can have, bound to their rooms. Raises MissingDependency without PyTorch."""
    try:
        from herd.recipe.stages import stage_table as table
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise MissingDependency("torch", extra="train") from None
        raise
    return table()
