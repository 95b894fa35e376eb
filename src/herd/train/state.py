"""Checkpoints of a run's whole state, which survive a kill at any instant.

    state/step-00000120/*.safetensors  weights, optimiser, random generators, callbacks' tensors; one file a rank that
                                       holds parts of them
    state/step-00000120/state.json     step, data cursor, counters, configuration, callbacks' numbers
    state/step-00000120/manifest.json  size and SHA-256 of all of them; written last, it marks the checkpoint as whole

A directory appears under its name only when all of it is on disk. A checkpoint that does not match its manifest is
passed over, aloud, for the one before. A run on any number of ranks, split in any way, can continue from it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from herd.errors import FileFormatError, HerdError
from herd.files import read_json, sha256_file, sync_directory, write_json
from herd.train.announce import announce
from herd.train.tensor_files import SUFFIX
from herd.train.world import OneRank, World

_STATE, _MANIFEST = "state.json", "manifest.json"
_DIGESTS = "digests-"
_FORMAT, _VERSION = "herd-train-state", 2


class StateStore:
    """The checkpoints in one directory, of which the newest `keep` are kept. Every rank calls the same methods."""

    def __init__(self, directory: Path, keep: int = 2, world: World | None = None) -> None:
        self.directory = directory
        self._keep = keep
        self._world = world or OneRank()
        self._damaged: set[int] = set()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints that were not found damaged, oldest first."""
        found = [path.parent.name.removeprefix("step-") for path in self.directory.glob(f"step-*/{_MANIFEST}")]
        return sorted({int(number) for number in found if number.isdecimal()} - self._damaged)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.directory / f"step-{step:08d}"

    def save(self, step: int, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> Path:
        """Write a checkpoint and drop the oldest ones. `values` must be JSON.

        Raises what the first rank that fails raises, on every rank, and leaves the older checkpoints as they are.
        """
        first, path = self._world.rank == 0, self.path(step)
        part = self.directory / f".{path.name}.part"
        if first:
            for damaged in self._damaged:
                shutil.rmtree(self.path(damaged), ignore_errors=True)
        self._damaged.clear()
        self._together(lambda: self._begin(part) if first else None)
        self._together(lambda: self._world.write_tensors(part, dict(tensors)))
        self._together(lambda: self._note_digests(part))
        self._together(lambda: self._commit(step, part, values) if first else None)
        return path

    def load_newest(self, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, values) of the newest whole checkpoint, or None when there is none at all.

        A rank that holds parts of the `parameters` gets those parts of what belongs to them. Raises HerdError when
        there are checkpoints and all of them are damaged: starting over in silence would throw the work away.
        """
        steps = self.steps()
        for step in reversed(steps):
            error = self._verify(self.path(step))
            if not self._world.any(error is not None):
                values: dict[str, Any] = read_json(self.path(step) / _STATE)
                return self._world.read_tensors(self.path(step), parameters), values
            if error is not None:
                announce(f"the checkpoint of step {step} is damaged and passed over: {error}")
            self._damaged.add(step)
        if steps:
            raise HerdError(
                f"all {len(steps)} checkpoints in {self.directory} are damaged",
                fix=f"remove {self.directory} to train from the beginning",
            )
        return None

    def sweep(self) -> None:
        """Remove what a killed process left half written."""
        for leftover in self.directory.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _together(self, action: Any) -> None:
        """Do it on every rank and wait for all; if it fails on one, no rank goes on as if it had not."""
        error: Exception | None = None
        try:
            action()
        except Exception as caught:
            error = caught
        if self._world.any(error is not None):
            raise error or HerdError("another rank could not write its part of the checkpoint")

    def _begin(self, part: Path) -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)

    def _note_digests(self, part: Path) -> None:
        """This rank's share of the files' digests: one rank would hash for longer than the others may wait."""
        write_json(part / f"{_DIGESTS}{self._world.rank}.json", {p.name: _digest(p) for p in self._mine(part)})

    def _mine(self, directory: Path) -> list[Path]:
        """The files of tensors that this rank looks after."""
        return sorted(directory.glob(f"*{SUFFIX}"))[self._world.rank :: self._world.size]

    def _commit(self, step: int, part: Path, values: dict[str, Any]) -> None:
        write_json(part / _STATE, values)
        files = {_STATE: _digest(part / _STATE)}
        for notes in sorted(part.glob(f"{_DIGESTS}*.json")):
            files |= read_json(notes)
            notes.unlink()
        write_json(part / _MANIFEST, {"format": _FORMAT, "version": _VERSION, "step": step, "files": files})
        if self.path(step).exists():
            shutil.rmtree(self.path(step))
        os.replace(part, self.path(step))
        sync_directory(self.directory)
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)

    def _verify(self, directory: Path) -> FileFormatError | None:
        """What is wrong with a checkpoint as far as this rank looks at it, if anything is."""
        try:
            manifest = read_json(directory / _MANIFEST)
            if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (
                _FORMAT,
                _VERSION,
            ):
                raise FileFormatError("is not a training state of this version", file=directory / _MANIFEST)
            files = manifest.get("files", {})
            if _STATE not in files or not any(name.endswith(SUFFIX) for name in files):
                raise FileFormatError("does not list a state and tensors", file=directory / _MANIFEST, field="files")
            for name in sorted(files)[self._world.rank :: self._world.size]:
                file = directory / name
                if not file.is_file():
                    raise FileFormatError("is missing", file=file)
                if files[name] != _digest(file):
                    raise FileFormatError("does not match its checksum", file=file, field="sha256")
        except FileFormatError as error:
            return error
        return None


def _digest(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
