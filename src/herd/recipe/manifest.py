"""stage.json: what a stage directory holds, what made it, what it cost; and whether that is still true.

status      running (also: was stopped), failed, done
key         everything that determines the result; `hash` is its digest, the first 8 digits name the directory
judges      what it was found good by
inputs      per input stage: its directory, hash, and digest of the artefacts that were read
artefacts   relative path → bytes and sha256 ; `digest` is one hash over them
"""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from herd.errors import FileFormatError
from herd.files import read_json, sha256_file, write_json
from herd.recipe.hashing import digest
from herd.recipe.measure import Usage, host, packages

MANIFEST = "stage.json"
ERROR_LOG = "error.log"
FORMAT = 1
_NOT_ARTEFACTS = (MANIFEST, ERROR_LOG, "state", "tokens", "extension.json", "promotion.json", "unpromoted")
"""Names at the top of a stage directory that are not results: a training run's resumable state and its token files, and
how it was judged on the way, which may be judged otherwise while the model stays what it is."""


@dataclass(frozen=True)
class Decision:
    """What to do with a stage, and why, in words for a person.

    `skip` it, it is done; `run` it in an empty directory; `resume` it in the directory as it is; `leave` it undone.
    """

    action: Literal["skip", "run", "resume", "leave"]
    reason: str


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a stage directory; None where there is none or where it cannot be trusted."""
    try:
        data = read_json(directory / MANIFEST)
    except (FileFormatError, OSError):
        return None
    return data if isinstance(data, dict) and data.get("format") == FORMAT else None


def decide(
    directory: Path,
    full_hash: str,
    input_digests: Mapping[str, str],
    *,
    resumes: bool,
    redo: bool,
    judges: Mapping[str, Any] | None = None,
) -> Decision:
    """Compare a stage directory with what it should hold. Reads every artefact to check its sha256."""
    if redo:
        return Decision("run", "asked for")
    manifest = read_manifest(directory)
    if manifest is None:
        return Decision("run", "new" if not directory.exists() else "its manifest is missing or damaged")
    if manifest["hash"] != full_hash:
        return Decision("run", "another stage's result has the same directory name")
    if {name: entry["digest"] for name, entry in manifest["inputs"].items()} != dict(input_digests):
        return Decision("run", "an input was made again and differs")
    if manifest["status"] != "done":
        if resumes:
            return Decision("resume", "it failed" if manifest["status"] == "failed" else "it was stopped")
        return Decision("run", "it failed" if manifest["status"] == "failed" else "it was stopped")
    if wrong := first_difference(directory, manifest):
        return Decision("run", wrong)
    if manifest.get("judges", {}) != (judges or {}):
        return Decision("resume", "it is judged otherwise")
    return Decision("skip", "unchanged")


def first_difference(directory: Path, manifest: Mapping[str, Any]) -> str | None:
    """The first artefact that is not as the manifest says, in words; None when all are."""
    for name, entry in manifest["artefacts"].items():
        file = directory / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"] or sha256_file(file) != entry["sha256"]:
            return f"{name} was changed"
    return None


def begin(
    directory: Path,
    decision: Decision,
    key: Mapping[str, Any],
    full_hash: str,
    inputs: Mapping[str, Any],
    judges: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Prepare the directory and write a manifest with status `running`."""
    earlier = read_manifest(directory) if decision.action == "resume" else None
    if decision.action == "run" and directory.exists():
        _clear(directory)
    directory.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "stage": key["stage"],
        "hash": full_hash,
        "key": dict(key),
        "judges": dict(judges or {}),
        "status": "running",
        "inputs": dict(inputs),
        "artefacts": {},
        "summary": "",
        "started": earlier["started"] if earlier else _now(),
        "finished": None,
        "attempts": (earlier["attempts"] if earlier else 0) + 1,
        "wall_seconds": earlier["wall_seconds"] if earlier else 0.0,
        "cpu_seconds": earlier["cpu_seconds"] if earlier else 0.0,
        "peak_memory_bytes": earlier["peak_memory_bytes"] if earlier else 0,
        "host": host(),
        "packages": packages(),
        "error": None,
    }
    write_json(directory / MANIFEST, manifest)
    return manifest


def finish(directory: Path, manifest: dict[str, Any], usage: Usage, summary: str) -> dict[str, Any]:
    """Write the manifest with status `done` over the artefacts that are there now."""
    done = _with_usage(manifest, usage) | {"status": "done", "summary": summary}
    return write_artefacts(directory, done)


def write_artefacts(directory: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Record the artefacts that are in the directory now, and write the manifest."""
    artefacts = {
        file.relative_to(directory).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(artefact_files(directory))
    }
    manifest = manifest | {"artefacts": artefacts, "digest": digest(artefacts), "error": None}
    write_json(directory / MANIFEST, manifest)
    return manifest


def stop(directory: Path, manifest: dict[str, Any], usage: Usage, *, error: str | None) -> dict[str, Any]:
    """Write the manifest of a stage that did not end: status `failed` with its error, or `running` when stopped."""
    stopped = _with_usage(manifest, usage) | {"status": "failed" if error else "running", "error": error}
    write_json(directory / MANIFEST, stopped)
    return stopped


def artefact_files(directory: Path) -> Iterator[Path]:
    """The files of a stage directory that are its result."""
    for folder, folders, names in os.walk(directory):
        top = Path(folder) == directory
        folders[:] = sorted(name for name in folders if not (top and name in _NOT_ARTEFACTS))
        for name in names:
            if not (top and name in _NOT_ARTEFACTS) and not (name.startswith(".") and name.endswith(".part")):
                yield Path(folder) / name


def _with_usage(manifest: dict[str, Any], usage: Usage) -> dict[str, Any]:
    return manifest | {
        "finished": _now(),
        "wall_seconds": round(manifest["wall_seconds"] + usage.wall_seconds, 3),
        "cpu_seconds": round(manifest["cpu_seconds"] + usage.cpu_seconds, 3),
        "peak_memory_bytes": max(manifest["peak_memory_bytes"], usage.peak_memory_bytes),
    }


def _clear(directory: Path) -> None:
    """Empty a stage directory by renaming it away first, so that it is never half full under its own name."""
    trash = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(trash, ignore_errors=True)
    directory.rename(trash)
    shutil.rmtree(trash)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
