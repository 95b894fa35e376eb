"""Stage hashes: equal hash, equal result. The hash covers everything a stage's result depends on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from herd.corpus import source_files
from herd.files import sha256_file
from herd.recipe.stage import BoundStage

CONTENT_LIMIT = 1 << 28
"""Sources up to 256 MiB are fingerprinted by content; larger ones by size and modification time."""


def canonical_json(data: object) -> str:
    """One text for equal data: sorted keys, no spaces, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(data: object) -> str:
    """SHA-256 of `canonical_json(data)`, hexadecimal."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def stage_key(bound: BoundStage, input_hashes: Mapping[str, str]) -> dict[str, Any]:
    """Everything that determines a stage's result, as plain data. Its `digest` is the stage's hash.

    How ranks share the work is left out, and what it is judged by, in the end or on the way: a run goes on when that
    changes.
    """
    fingerprint = bound.stage.fingerprint
    config = bound.config.model_dump(mode="json", exclude={*bound.stage.judges, *bound.stage.gates})
    for fields in (config, config.get("train")):
        if isinstance(fields, dict):
            fields.pop("parallel", None)
    return {
        "stage": bound.name,
        "version": bound.stage.version,
        "config": config,
        "inputs": {name: input_hashes[name] for name in bound.inputs},
        "external": fingerprint(bound.config) if fingerprint else None,
    }


def fingerprint_paths(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """A description of files and folders that changes when their content does.

    Per path: number of files, bytes and one SHA-256 over the sorted relative names with, for each file, its content
    (when all paths together hold at most CONTENT_LIMIT bytes) or its size and modification time. What the corpus does
    not read (hidden entries such as .git, caches) does not count.
    """
    listings = [(Path(path), sorted(_files(Path(path)))) for path in paths]
    total = sum(file.stat().st_size for _, files in listings for file in files)
    by_content = total <= CONTENT_LIMIT
    result = []
    for root, files in listings:
        state = hashlib.sha256()
        size = 0
        for file in files:
            stat = file.stat()
            size += stat.st_size
            name = file.name if root.is_file() else file.relative_to(root).as_posix()
            mark = sha256_file(file) if by_content else f"{stat.st_size} {stat.st_mtime_ns}"
            state.update(f"{name}\0{mark}\n".encode("utf-8", "surrogateescape"))
        result.append({"files": len(files), "bytes": size, "by_content": by_content, "sha256": state.hexdigest()})
    return result


def _files(path: Path) -> Iterator[Path]:
    """The files that are read below a path; missing and unreadable ones are left to the reader's own error."""
    for file in source_files(path):
        if os.access(file, os.R_OK) and file.is_file():
            yield file
