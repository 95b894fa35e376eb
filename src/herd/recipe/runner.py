"""Run a recipe: skip what is done, run or resume the rest, keep run.json true.

runs/<name>/run.json                  pointers: the model, the report, every stage's directory
runs/<name>/<stage>-<hash8>/          one stage's result and its manifest, stage.json
"""

from __future__ import annotations

import contextlib
import errno
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from herd.errors import FileFormatError, HerdError, ResourceError, UsageError
from herd.files import atomic_write, read_json, write_json
from herd.recipe.loading import Recipe
from herd.recipe.lock import run_lock
from herd.recipe.manifest import ERROR_LOG, begin, decide, finish, read_manifest, stop
from herd.recipe.measure import Meter
from herd.recipe.planning import Placed, place
from herd.recipe.stage import Stage, StageContext
from herd.train.launch import Ranks, started_ranks

RUN_FILE = "run.json"
_MODEL_STAGES = ("sft", "extend", "base")
"""Stages whose checkpoint a run directory stands for, best first."""


@dataclass(frozen=True)
class StageEvent:
    """One line of progress. `seconds` is the stage's wall time over all its attempts so far."""

    kind: Literal["start", "done", "skip", "stop", "fail"]
    stage: str
    directory: Path
    reason: str = ""
    seconds: float = 0.0
    summary: str = ""


class StageFailed(HerdError):
    """A stage raised. Has the exit code of the HerdError behind it, 4 when memory or disk ran out, else 1."""

    def __init__(self, stage: str, cause: Exception, log: Path, command: str) -> None:
        self.stage = stage
        self.exit_code = _exit_code(cause)
        reason = f"{type(cause).__name__}: {cause}".strip(": ")
        fix: str | None = f"{command} goes on with this stage"
        details: dict[str, Any] = {}
        if isinstance(cause, HerdError):
            reason = cause.what
            details = {"allowed": cause.allowed} | ({} if cause.value is None else {"value": cause.value})
            if cause.fix and _changes(cause):
                fix = cause.fix
            elif cause.fix:
                fix = f"{cause.fix}; then {fix}"
            elif isinstance(cause, UsageError):
                fix = None  # the same command would fail again
        elif _lost_rank(cause):
            reason = "another rank has stopped, or cannot be reached"
        if not isinstance(cause, HerdError):
            fix = f"{fix} (the traceback is in {log})"
        super().__init__(f"stage {stage!r} failed: {reason}", **details, fix=fix)


def run(
    recipe: Recipe,
    table: Sequence[Stage],
    run_dir: str | Path,
    *,
    redo_from: str | None = None,
    only: str | None = None,
    on_event: Callable[[StageEvent], None] = lambda event: None,
    command: str | None = None,
) -> dict[str, Any]:
    """Bring a run directory up to date with its recipe; return the content of its run.json.

    `redo_from` runs that stage and all after it again even if they are done; `only` runs no other stage. Stages that
    were stopped resume. `command`, by default the recipe's, is quoted in errors and reports as the way to go on. Raises
    UsageError before anything runs, StageFailed when a stage fails, ResourceError when another run holds the directory.
    KeyboardInterrupt and SystemExit pass through once the stage's manifest is written.
    Started by torchrun, ranks but the first run the stages that it calls for.
    """
    run_dir = Path(run_dir)
    command = command or recipe.command
    placed = place(recipe, table, run_dir, redo_from=redo_from, only=only)
    with started_ranks() as ranks:
        if ranks.leads:
            return _lead(ranks, recipe, placed, run_dir, on_event, command)
        _follow(ranks, recipe, placed, command)
    return read_run(run_dir)


def _lead(
    ranks: Ranks,
    recipe: Recipe,
    placed: Sequence[Placed],
    run_dir: Path,
    on_event: Callable[[StageEvent], None],
    command: str,
) -> dict[str, Any]:
    _check_ranks(placed, ranks.size)
    with run_lock(run_dir):
        state = _begin_state(recipe, run_dir, placed, command)
        for position, item in enumerate(placed):
            if item.wanted:
                context = StageContext(
                    recipe=recipe,
                    directories={other.name: other.directory for other in placed[:position]},
                    command=command,
                )
                _run_stage(item, context, state, run_dir, on_event, ranks)
            else:
                _record(state, item, read_manifest(item.directory), run_dir)
    return state


def _check_ranks(placed: Sequence[Placed], ranks: int) -> None:
    """Raises UsageError for a stage that is still to be run and cannot be by so many ranks, before those before it."""
    for item in placed:
        done = (read_manifest(item.directory) or {}).get("status") == "done"
        if item.bound.stage.check_ranks is not None and item.wanted and not done:
            try:
                item.bound.stage.check_ranks(item.bound.config, ranks)
            except UsageError as error:
                raise error.inside(item.name) from None


def _follow(ranks: Ranks, recipe: Recipe, placed: Sequence[Placed], command: str) -> None:
    """Run what rank 0 calls for."""
    items = {item.name: item for item in placed}
    directories = {item.name: item.directory for item in placed}
    for name in ranks.follow():
        item = items[name]
        context = StageContext(recipe=recipe, directories=directories, command=command)
        paths = {other: directories[other] for other in item.bound.inputs}
        item.bound.stage.run(item.bound.config, paths, item.directory, context)


def read_run(run_dir: str | Path) -> dict[str, Any]:
    """The content of a run directory's run.json. Raises FileFormatError when it is not one."""
    path = Path(run_dir) / RUN_FILE
    if not path.is_file():
        raise FileFormatError(
            "is not a run directory: it has no run.json", file=run_dir, fix="herd run recipes/pocket.yaml makes one"
        )
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("stages"), dict):
        raise FileFormatError("is not a run's pointer file", file=path, field="stages")
    return data


def _run_stage(
    item: Placed,
    context: StageContext,
    state: dict[str, Any],
    run_dir: Path,
    on_event: Callable[[StageEvent], None],
    ranks: Ranks,
) -> None:
    """Skip, run or resume one stage, and record it in `state`."""
    stage, out, name = item.bound.stage, item.directory, item.name
    inputs = _inputs(item, state)
    decision = decide(
        out,
        item.hash,
        {other: entry["digest"] for other, entry in inputs.items()},
        resumes=stage.resumes,
        redo=item.redo,
        judges=item.bound.judges,
    )
    if decision.action == "skip":
        manifest = read_manifest(out) or {}
        _record(state, item, manifest, run_dir)
        on_event(StageEvent("skip", name, out, decision.reason, manifest["wall_seconds"], manifest["summary"]))
        return
    manifest = begin(out, decision, item.key, item.hash, inputs, item.bound.judges)
    on_event(StageEvent("start", name, out, decision.reason, manifest["wall_seconds"]))
    meter = Meter()
    try:
        paths = {other: context.directories[other] for other in item.bound.inputs}
        if stage.ranks:
            ranks.call(name)
        summary = stage.run(item.bound.config, paths, out, context)
    except (KeyboardInterrupt, SystemExit):
        manifest = stop(out, manifest, meter.read(), error=None)
        _record(state, item, manifest, run_dir)
        on_event(StageEvent("stop", name, out, seconds=manifest["wall_seconds"]))
        raise
    except Exception as error:
        message = str(error) or type(error).__name__
        with contextlib.suppress(OSError):  # a disk that is full must not hide what went wrong
            with atomic_write(out / ERROR_LOG, "w") as log:
                log.write(traceback.format_exc())
            manifest = stop(out, manifest, meter.read(), error=message)
            _record(state, item, manifest, run_dir)
        on_event(StageEvent("fail", name, out, seconds=manifest["wall_seconds"]))
        raise StageFailed(name, error, out / ERROR_LOG, context.command) from error
    (out / ERROR_LOG).unlink(missing_ok=True)
    manifest = finish(out, manifest, meter.read(), summary)
    _record(state, item, manifest, run_dir)
    on_event(StageEvent("done", name, out, decision.reason, manifest["wall_seconds"], summary))


def _inputs(item: Placed, state: Mapping[str, Any]) -> dict[str, Any]:
    """For the manifest: which results a stage reads. All are done, unless `--only` left one out."""
    inputs: dict[str, Any] = {}
    for name in item.bound.inputs:
        entry = state["stages"].get(name)
        if entry is None or entry["status"] != "done":
            raise UsageError(
                f"--only {item.name} needs the stage {name!r}, which is not done",
                fix=f"the same command with --only {name}, or without --only",
            )
        inputs[name] = {key: entry[key] for key in ("directory", "hash", "digest")}
    return inputs


def _begin_state(recipe: Recipe, run_dir: Path, placed: Sequence[Placed], command: str) -> dict[str, Any]:
    """run.json as a run starts: the old run's model and report stay until this run has its own."""
    try:
        old = read_run(run_dir)
    except FileFormatError:
        old = {}
    state: dict[str, Any] = {
        "name": recipe.name,
        "description": recipe.description,
        "seed": recipe.seed,
        "recipe": recipe.source,
        "command": command,
        "order": [item.name for item in placed],
        "stages": {},
    }
    kept = {key: old[key] for key in ("model", "report") if key in old and (run_dir / str(old[key])).exists()}
    return state | kept


def _record(state: dict[str, Any], item: Placed, manifest: Mapping[str, Any] | None, run_dir: Path) -> None:
    """Put one stage, if there is anything of it, into run.json."""
    if manifest is None:
        return
    entry = {"directory": item.directory.name, "hash": item.hash}
    entry |= {key: manifest[key] for key in ("status", "wall_seconds", "summary")}
    if manifest["status"] == "done":
        entry["digest"] = manifest["digest"]
    state["stages"][item.name] = entry
    done = [name for name in _MODEL_STAGES if state["stages"].get(name, {}).get("status") == "done"]
    if done:
        state["model"] = f"{state['stages'][done[0]]['directory']}/checkpoint"
    if item.name == "report" and manifest["status"] == "done":
        state["report"] = f"{item.directory.name}/report.html"
    write_json(run_dir / RUN_FILE, state)


def _changes(cause: HerdError) -> bool:
    """Whether what it advises is another command: an override, or after a wrong use all but something to do before."""
    advice = cause.fix or ""
    before = re.match(r"(herd|pip|make|remove) ", advice)
    return (isinstance(cause, UsageError) and before is None) or re.match(r"[a-z_.]+=\S", advice) is not None


def _lost_rank(cause: Exception) -> bool:
    """gloo's and NCCL's words, when a rank that was waited for is gone."""
    words = re.search("gloo|nccl|Connection (closed|reset)", str(cause), re.IGNORECASE)
    return isinstance(cause, RuntimeError) and words is not None


def _exit_code(cause: Exception) -> int:
    if isinstance(cause, HerdError):
        return cause.exit_code
    if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.ENOMEM)):
        return ResourceError.exit_code
    return 1
