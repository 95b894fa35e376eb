"""`herd run`: bring a run directory up to date with its recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from herd.cli.output import console, emit, table, typed

if TYPE_CHECKING:
    from herd.recipe import Decision, Placed, Recipe, StageEvent

_SIGNS = {"start": "▸", "done": "✓", "skip": "–", "stop": "■", "fail": "✗"}


def command(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one in recipes/.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="STAGE.FIELD=VALUE", help="Changed values, as YAML. STAGE=false leaves a stage out."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory.  [default: runs/NAME]")] = None,
    redo_from: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Run this stage and all after it again.")
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Run no other stage.")] = None,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="Run a small copy of it, in a minute or two, in runs/NAME-shrunk.")
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="What the small copy reads.  [default: Python's standard library]"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run and what is missing for it, and run nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
) -> int:
    """Run a recipe: every stage that is new or changed, or that was stopped, in its own directory.

    Stages that are done and unchanged are skipped, so the same command continues after Ctrl-C, a crash or an edit.

    Examples:

        herd run recipes/pocket.yaml

        herd run recipes/pocket.yaml 'corpus.sources=[notes, posts.jsonl]' --out runs/notes

        herd run recipes/pocket.yaml base.train.lr=2e-3 --dry-run

        herd run recipes/pocket.yaml --from evaluate

        herd run llama3.1-405b --shrink
    """
    from herd.corpus import STDLIB
    from herd.errors import UsageError
    from herd.recipe import load_recipe, place, preview, run, stage_table
    from herd.train.launch import Ranks

    if text is not None and not shrink:
        raise UsageError(
            "--text is what a small copy reads, and needs --shrink", fix="corpus.sources=[FOLDER] for the recipe itself"
        )
    loaded = load_recipe(recipe, overrides or [], shrink=shrink, text=text or STDLIB, ranks=Ranks().size)
    run_dir = out or Path("runs") / loaded.name
    stages = stage_table()
    if dry_run:
        placed = place(loaded, stages, run_dir, redo_from=redo_from, only=only, allow_missing=True)
        for error in (error for item in placed for error in item.bound.missing):
            console().print(f"missing: {error}", style="yellow", markup=False, soft_wrap=True)
        decisions = preview(placed)
        emit(_plan_data(run_dir, decisions), as_json, lambda: print(_plan_table(decisions)))
        return 0
    again = loaded.command + (f" --out {shlex.quote(str(out))}" if out else "")
    again = Ranks().started_as(again)
    lines = _Lines(loaded, run_dir)
    try:
        state = run(loaded, stages, run_dir, redo_from=redo_from, only=only, on_event=lines, command=again)
    except (KeyboardInterrupt, SystemExit) as stop:
        console().print(f"Stopped. {typed(again)} continues where it was.", markup=False, soft_wrap=True)
        return 130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
    emit({"run": str(run_dir), **state}, as_json, lambda: _summary(run_dir, state, lines.skipped))
    return 0


class _Lines:
    """Progress for people: a line when a stage starts and one when it ends."""

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        self.skipped: set[str] = set()
        self._width = max(len(name) for name in recipe.stages)
        self._print(f"{recipe.name} → {run_dir} ({len(recipe.stages)} stages, seed {recipe.seed})", "bold")

    def __call__(self, event: StageEvent) -> None:
        from herd.recipe.units import duration

        name = event.stage.ljust(self._width)
        time = duration(event.seconds).rjust(10)
        text = {
            "start": f"{name}  {event.reason}" if event.reason != "new" else event.stage,
            "done": f"{name} {time}  {event.summary}",
            "skip": f"{name} {time}  {event.reason}: {event.summary}",
            "stop": f"{name} {time}  stopped",
            "fail": f"{name} {time}  failed",
        }[event.kind]
        if event.kind == "skip":
            self.skipped.add(event.stage)
        style = {"start": "cyan", "done": "green", "skip": "dim", "stop": "yellow", "fail": "red"}[event.kind]
        self._print(f"{_SIGNS[event.kind]} {text}", style)

    def _print(self, text: str, style: str) -> None:
        from herd.progress import status

        status("")
        console().print(text, style=style, markup=False, soft_wrap=True)


def _plan_data(run_dir: Path, decisions: list[tuple[Placed, Decision]]) -> dict[str, Any]:
    stages = [
        {
            "stage": item.name,
            "action": decision.action,
            "reason": decision.reason,
            "directory": str(item.directory) if item.hash else None,
            "missing": [str(error.value) for error in item.bound.missing],
            "config": item.bound.config.model_dump(mode="json"),
        }
        for item, decision in decisions
    ]
    return {"run": str(run_dir), "stages": stages}


def _plan_table(decisions: list[tuple[Placed, Decision]]) -> str:
    rows = [[item.name, decision.action, decision.reason, str(item.directory)] for item, decision in decisions]
    return table(["stage", "would", "because", "directory"], rows)


def _summary(run_dir: Path, state: dict[str, Any], skipped: set[str]) -> None:
    from herd.recipe.units import duration

    rows = []
    for name, entry in state["stages"].items():
        note = " (kept)" if name in skipped else ""
        rows.append([name, duration(entry["wall_seconds"]) + note, entry["summary"]])
    rows.append(["total", duration(sum(entry["wall_seconds"] for entry in state["stages"].values())), ""])
    print(table(["stage", "time", "result"], rows))
    for label, key in (("report", "report"), ("model", "model")):
        if key in state:
            print(f"{label}: {run_dir / state[key]}")
    if "sft" in state["stages"]:
        print(f"talk to it: {typed(f'herd chat {shlex.quote(str(run_dir))}')}")
    elif "model" in state:
        print(f"let it go on with a text: {typed(f'herd generate {shlex.quote(str(run_dir))} TEXT')}")
