"""Checkpoints of a run's whole state, which survive a kill at any instant.

    state/step-00000120/tensors.pt     weights, optimiser, random generators, callbacks' tensors
    state/step-00000120/state.json     step, data cursor, counters, configuration, callbacks' numbers
    state/step-00000120/manifest.json  size and SHA-256 of both; written last, it marks the checkpoint as complete

A directory appears under its name only when all of it is on disk. Tensors are read with torch's restricted loader, so
a foreign file cannot run code. A checkpoint that does not match its manifest is passed over, aloud, for the one before.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from herd.errors import FileFormatError, HerdError
from herd.files import atomic_dir, atomic_write, read_json, sha256_file, write_json
from herd.train.announce import announce

_TENSORS, _STATE, _MANIFEST = "tensors.pt", "state.json", "manifest.json"
_FORMAT, _VERSION = "herd-train-state", 1


class StateStore:
    """The checkpoints in one directory; the newest `keep` are kept."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self._keep = keep
        self._damaged: set[int] = set()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints that were not found damaged, oldest first."""
        found = [path.parent.name.removeprefix("step-") for path in self.directory.glob(f"step-*/{_MANIFEST}")]
        return sorted({int(number) for number in found if number.isdecimal()} - self._damaged)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.directory / f"step-{step:08d}"

    def save(self, step: int, tensors: dict[str, Any], values: dict[str, Any]) -> Path:
        """Write a checkpoint and drop the oldest ones. `values` must be JSON; `tensors` may be nested."""
        for damaged in self._damaged:
            shutil.rmtree(self.path(damaged), ignore_errors=True)
        self._damaged.clear()
        with atomic_dir(self.path(step)) as directory:
            with atomic_write(directory / _TENSORS) as file:
                torch.save(tensors, file)
            write_json(directory / _STATE, values)
            files = {
                name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_file(directory / name)}
                for name in (_TENSORS, _STATE)
            }
            write_json(directory / _MANIFEST, {"format": _FORMAT, "version": _VERSION, "step": step, "files": files})
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return self.path(step)

    def load_newest(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(tensors, values) of the newest whole checkpoint, or None when there is none at all.

        Raises HerdError when there are checkpoints and all of them are damaged: starting over in silence would throw
        the work away.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._load(step)
            except FileFormatError as error:
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

    def _load(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        directory = self.path(step)
        manifest = read_json(directory / _MANIFEST)
        if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (_FORMAT, _VERSION):
            raise FileFormatError("is not a training state of this version", file=directory / _MANIFEST)
        for name in (_TENSORS, _STATE):
            entry, file = manifest.get("files", {}).get(name, {}), directory / name
            if not file.is_file():
                raise FileFormatError("is missing", file=file)
            if file.stat().st_size != entry.get("bytes") or sha256_file(file) != entry.get("sha256"):
                raise FileFormatError("does not match its checksum", file=file, field="sha256")
        tensors = torch.load(directory / _TENSORS, map_location="cpu", weights_only=True)
        return tensors, read_json(directory / _STATE)
