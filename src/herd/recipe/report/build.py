"""Write a run's report: as the last stage of a recipe, or again later for a run directory."""

from __future__ import annotations

import contextlib
from pathlib import Path

from herd.config import parse_config
from herd.errors import FileFormatError, MissingDependency
from herd.files import atomic_write
from herd.recipe.lock import run_lock
from herd.recipe.manifest import read_manifest, write_artefacts
from herd.recipe.report.card import render_card
from herd.recipe.report.config import ReportConfig
from herd.recipe.report.data import RunData
from herd.recipe.report.page import render_page
from herd.recipe.report.picture import write_picture
from herd.recipe.runner import read_run


def write_report(run: RunData, out: Path) -> list[Path]:
    """Write report.html, MODEL_CARD.md and, where matplotlib is installed, loss.png into `out`; return their paths."""
    written = [out / "report.html", out / "MODEL_CARD.md"]
    for path, text in zip(written, (render_page(run), render_card(run)), strict=True):
        with atomic_write(path, "w") as file:
            file.write(text)
    with contextlib.suppress(MissingDependency):
        if write_picture(run, out / "loss.png"):
            written.append(out / "loss.png")
    return written


def rebuild_report(run_dir: str | Path) -> list[Path]:
    """Write a run's report anew from what its stages left, finished or not.

    The files go where the run's own report is, or into the run directory when it has none. Raises FileFormatError for
    a directory that is not a run, or in which no stage is done.
    """
    run_dir = Path(run_dir)
    state = read_run(run_dir)
    directories = {}
    for name in state.get("order", state["stages"]):
        entry = state["stages"].get(name, {})
        directory = run_dir / Path(str(entry.get("directory", ""))).name
        if entry.get("status") == "done" and read_manifest(directory) is not None:
            directories[name] = directory
    report = directories.pop("report", None)
    if not directories:
        raise FileFormatError(
            "no stage of this run is done, so there is nothing to report",
            file=run_dir,
            fix=str(state.get("command", f"herd run recipes/pocket.yaml --out {run_dir}")),
        )
    manifest = read_manifest(report) if report else None
    config = (
        parse_config(ReportConfig, manifest["key"]["config"], f"{report}/stage.json") if manifest else ReportConfig()
    )
    run = RunData(
        name=str(state.get("name", run_dir.name)),
        seed=int(state.get("seed", 0)),
        command=str(state.get("command", "herd run")),
        description=str(state.get("description", "")),
        directories=directories,
        config=config,
    )
    with run_lock(run_dir):
        written = write_report(run, report or run_dir)
        if report and manifest:
            write_artefacts(report, manifest)
    return written
