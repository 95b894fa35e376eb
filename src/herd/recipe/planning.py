"""Where each stage of a recipe lives and what would happen to it, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herd.errors import UsageError, near
from herd.recipe.hashing import digest, stage_key
from herd.recipe.loading import Recipe
from herd.recipe.manifest import Decision, decide, read_manifest
from herd.recipe.stage import BoundStage, Stage, bind

UNKNOWN = "????????"
"""In place of a hash that depends on what is missing."""


@dataclass(frozen=True)
class Placed:
    """A stage with its place in a run directory. `key` is what determines its result, `hash` the digest of that; both
    are empty where something of it is missing.

    `redo`: to be run again even if done. `wanted`: not left out by `--only`.
    """

    bound: BoundStage
    key: Mapping[str, Any]
    hash: str
    directory: Path
    redo: bool
    wanted: bool

    @property
    def name(self) -> str:
        return self.bound.name


def place(
    recipe: Recipe,
    table: Sequence[Stage],
    run_dir: str | Path,
    *,
    redo_from: str | None = None,
    only: str | None = None,
    allow_missing: bool = False,
) -> list[Placed]:
    """Validate a recipe and give every stage its hash and directory. Writes nothing. Raises UsageError, with
    `allow_missing` not for what is missing outside the run; this is for looking only."""
    bound = bind(recipe, table, allow_missing=allow_missing)
    names = [stage.name for stage in bound]
    for option, value in (("--from", redo_from), ("--only", only)):
        if value is not None and value not in names:
            raise UsageError(f"{option}: {recipe.source} has no such stage", value=value, allowed=near(value, names))
    hashes: dict[str, str] = {}
    placed: list[Placed] = []
    redo = False
    for stage in bound:
        unknown = bool(stage.missing) or not all(hashes[name] for name in stage.inputs)
        key = {} if unknown else stage_key(stage, hashes)
        full = hashes[stage.name] = "" if unknown else digest(key)
        redo = redo or stage.name == redo_from
        wanted = only is None or stage.name == only
        placed.append(Placed(stage, key, full, Path(run_dir) / f"{stage.name}-{full[:8] or UNKNOWN}", redo, wanted))
    return placed


def preview(placed: Sequence[Placed]) -> list[tuple[Placed, Decision]]:
    """What a run would do now, stage by stage, with the reason. Checks the sha256 of every finished artefact."""
    digests: dict[str, str] = {}
    decisions: list[tuple[Placed, Decision]] = []
    for item in placed:
        decision = _preview_one(item, digests)
        if decision.action == "skip":
            digests[item.name] = (read_manifest(item.directory) or {})["digest"]
        decisions.append((item, decision))
    return decisions


def _preview_one(item: Placed, digests: Mapping[str, str]) -> Decision:
    if not item.wanted:
        manifest = read_manifest(item.directory)
        done = manifest is not None and manifest["status"] == "done"
        return Decision("skip" if done else "leave", "not asked for")
    if item.bound.missing:
        return Decision("run", f"needs {', '.join(str(error.value) for error in item.bound.missing)}")
    waiting = [name for name in item.bound.inputs if name not in digests]
    if not waiting or item.redo:
        known = {name: digests[name] for name in item.bound.inputs if name in digests}
        stage, judges = item.bound.stage, item.bound.judges
        return decide(item.directory, item.hash, known, resumes=stage.resumes, redo=item.redo, judges=judges)
    manifest = read_manifest(item.directory)
    if manifest is not None and manifest["hash"] == item.hash and manifest["status"] == "done":
        return Decision("run", f"kept if {waiting[0]} comes out the same")
    return Decision("run", f"after {waiting[0]}")
