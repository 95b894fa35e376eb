"""`herd list`: every Llama release."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from herd.cli.output import emit, table
from herd.errors import UsageError


def command(
    match: Annotated[str, typer.Argument(help="Show only names that contain this text.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the data as JSON.")] = False,
) -> None:
    """List every Llama release with its size, context, memory and licence.

    Examples:

        herd list

        herd list llama3.1 --json
    """
    rows = [row for row in _rows() if match.lower() in row["name"]]
    if not rows:
        raise UsageError("no release has this in its name", value=match, fix="herd list shows all names")
    emit(rows, as_json, lambda: _table(rows))


def _rows() -> list[dict[str, Any]]:
    from herd.architecture import active_parameter_count, releases, weight_bytes

    return [
        {
            "name": release.name,
            "parameters": release.parameters,
            "active_parameters": active_parameter_count(release.config),
            "context": release.config.context_length,
            "bytes": {dtype: weight_bytes(release.config, dtype) for dtype in ("bf16", "q8_0", "q4_0")},
            "licence": release.licence,
            "released": release.released,
            "note": release.note,
            "config": release.config.to_dict(),
        }
        for release in releases.values()
    ]


def _table(rows: list[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        sizes = [f"{row['bytes'][dtype] / 2**30:,.1f}" for dtype in ("bf16", "q8_0", "q4_0")]
        name = row["name"] if row["released"] else f"{row['name']} (unreleased)"
        lines.append([name, f"{row['parameters']:,}", f"{row['context']:,}", *sizes, row["licence"]])
    print(table(["name", "parameters", "context", "bf16 GiB", "q8_0 GiB", "q4_0 GiB", "licence"], lines))
