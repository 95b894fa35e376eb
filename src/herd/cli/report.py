"""`herd report`: rebuild a run's HTML report and model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from herd.cli.output import emit


def command(
    run_dir: Annotated[Path, typer.Argument(help="A run directory, for example runs/pocket.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths as JSON.")] = False,
) -> None:
    """Write report.html, MODEL_CARD.md and loss.png again from what a run's stages left, finished or not.

    Examples:

        herd report runs/pocket
    """
    from herd.recipe.report import rebuild_report

    written = [str(path) for path in rebuild_report(run_dir)]
    emit({"files": written}, as_json, lambda: print("\n".join(written)))
