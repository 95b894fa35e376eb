"""`herd fields`: what a recipe can say."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from herd.cli.output import emit, table
from herd.errors import UsageError


def command(
    match: Annotated[str, typer.Argument(help="Show only fields whose path contains this text.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page of the docs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the data as JSON.")] = False,
) -> None:
    """List every field of every stage of a recipe: what is allowed, its default, what it means.

    A field is set in the recipe file, or by `herd run RECIPE STAGE.FIELD=VALUE`.

    Examples:

        herd fields

        herd fields base.train

        herd fields lr --json
    """
    from herd.recipe import reference, stage_table, to_markdown

    if markdown and as_json:
        raise UsageError("one of both", value="--markdown --json", allowed="--markdown, or --json")
    stages = stage_table()
    rows = [row for row in reference(stages) if match.lower() in row.path]
    if not rows:
        raise UsageError("no field has this in its path", value=match, fix="herd fields shows all")
    if markdown:
        print(to_markdown(rows, stages), end="")
        return
    cells = [[row.path, row.default, row.allowed, row.description] for row in rows]
    emit(
        [dataclasses.asdict(row) for row in rows],
        as_json,
        lambda: print(table(["field", "default", "allowed", "meaning"], cells)),
    )
