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


@dataclass(frozen=True)
class Placed:
    """A stage with its place in a run directory. `key` is what determines its result, `hash` the digest of that.

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
) -> list[Placed]:
    """Validate a recipe and give every stage its hash and directory. Writes nothing. Raises UsageError."""
    bound = bind(recipe, table)
    names = [stage.name for stage in bound]
    for option, value in (("--from", redo_from), ("--only", only)):
        if value is not None and value not in names:
            raise UsageError(f"{option}: {recipe.source} has no such stage", value=value, allowed=near(value, names))
    hashes: dict[str, str] = {}
    placed: list[Placed] = []
    redo = False
    for stage in bound:
        key = stage_key(stage, hashes)
        full = hashes[stage.name] = digest(key)
        redo = redo or stage.name == redo_from
        wanted = only is None or stage.name == only
        placed.append(Placed(stage, key, full, Path(run_dir) / f"{stage.name}-{full[:8]}", redo, wanted))
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
    waiting = [name for name in item.bound.inputs if name not in digests]
    if not waiting or item.redo:
        known = {name: digests[name] for name in item.bound.inputs if name in digests}
        return decide(item.directory, item.hash, known, resumes=item.bound.stage.resumes, redo=item.redo)
    manifest = read_manifest(item.directory)
    if manifest is not None and manifest["hash"] == item.hash and manifest["status"] == "done":
        return Decision("run", f"kept if {waiting[0]} comes out the same")
    return Decision("run", f"after {waiting[0]}")
