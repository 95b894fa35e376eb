"""What a run left behind, read back for the report: manifests, result files, metrics, the model's shape.

Every file may be missing (a recipe can leave stages out); what is there is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from herd.architecture import LlamaConfig, parameter_count
from herd.errors import HerdError
from herd.files import read_json
from herd.recipe.compute import Energy, TrainingCompute, training_compute
from herd.recipe.manifest import read_manifest
from herd.recipe.report.config import ReportConfig

TRAINING_STAGES = ("base", "sft")


@dataclass(frozen=True)
class RunData:
    """A run as the report sees it: names, the stage directories that are done, and the report's own config."""

    name: str
    seed: int
    command: str
    description: str
    directories: Mapping[str, Path]
    config: ReportConfig

    @cached_property
    def manifests(self) -> dict[str, dict[str, Any]]:
        """Stage name → manifest, in the order of the run."""
        found = {name: read_manifest(directory) for name, directory in self.directories.items()}
        return {name: manifest for name, manifest in found.items() if manifest is not None}

    def result(self, stage: str, file: str) -> dict[str, Any]:
        """A stage's JSON object; empty when the stage or the file is not there."""
        if stage not in self.directories or not (self.directories[stage] / file).is_file():
            return {}
        data = read_json(self.directories[stage] / file)
        return data if isinstance(data, dict) else {}

    def stage_config(self, stage: str) -> dict[str, Any]:
        """The resolved configuration that a stage ran with."""
        return dict(self.manifests.get(stage, {}).get("key", {}).get("config", {}))

    @cached_property
    def model(self) -> LlamaConfig | None:
        """Shape of the trained model."""
        from herd.checkpoint import open_checkpoint

        for stage in ("sft", "extend", "base"):
            folder = self.directories.get(stage, Path()) / "checkpoint"
            if stage in self.directories and folder.is_dir():
                try:
                    with open_checkpoint(folder) as checkpoint:
                        return checkpoint.config
                except HerdError:
                    continue
        return None

    @property
    def parameters(self) -> int | None:
        return parameter_count(self.model) if self.model else None

    @cached_property
    def training(self) -> dict[str, Training]:
        """What the training stages recorded, in order."""
        return {name: Training(self, name) for name in TRAINING_STAGES if name in self.manifests}

    @property
    def fixed_steps(self) -> list[str]:
        """Overrides for as many steps as there were, where a time limit decided that."""
        overrides = []
        for stage in self.training:
            config, steps = self.stage_config(stage), self.result(stage, "result.json").get("steps")
            if config.get("max_minutes") and steps:
                overrides += [f"{stage}.max_minutes=null", f"{stage}.train.steps={steps}"]
                overrides += [f"{stage}.epochs=null"] if config.get("epochs") else []
        return overrides

    @property
    def wall_seconds(self) -> float:
        """All stages together."""
        return float(sum(manifest["wall_seconds"] for manifest in self.manifests.values()))

    @property
    def cpu_seconds(self) -> float:
        return float(sum(manifest["cpu_seconds"] for manifest in self.manifests.values()))

    @property
    def gpus(self) -> list[str]:
        """Names of the GPUs that stages had at hand."""
        return sorted({name for manifest in self.manifests.values() for name in manifest["host"].get("gpus", [])})

    def energy(self, stage: str | None = None) -> Energy:
        """Of one stage or of the whole run: core-hours that were busy, at the configured watts."""
        seconds = self.manifests[stage]["cpu_seconds"] if stage else self.cpu_seconds
        return Energy(seconds / 3600, self.config.watts_per_core, self.config.pue, self.config.carbon_kg_per_kwh)

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """results.json of the evaluation, its models in the order of the run (JSON files here are sorted by key)."""
        results = self.result("evaluate", "results.json")
        order = {label: i for i, label in enumerate(results.get("models", []))}
        for part in {"bits_per_byte", "exact_match", "samples"} & results.keys():
            labels = sorted(results[part], key=lambda label: (order.get(label.split(",")[0], len(order)), label))
            results[part] = {label: results[part][label] for label in labels}
        return results

    @property
    def bits(self) -> dict[str, float]:
        """Held-out bits per byte: model label → value, in the order of the run."""
        return {name: entry["bits_per_byte"] for name, entry in self.evaluation.get("bits_per_byte", {}).items()}

    @property
    def compressors(self) -> dict[str, float]:
        """Bits per byte of general compressors on the same text, the best first."""
        found = {name: entry["bits_per_byte"] for name, entry in self.evaluation.get("compressors", {}).items()}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    @property
    def best_compressor(self) -> tuple[str, float]:
        """Name and bits per byte of the strongest compressor; an empty name when none was tried."""
        return next(iter(self.compressors.items()), ("", 0.0))

    @cached_property
    def quantised(self) -> dict[str, Any]:
        """results.json of the quantisation, the largest format first."""
        results = self.result("quantise", "results.json")
        if results:
            ordered = sorted(results["formats"].items(), key=lambda item: -item[1]["bits_per_weight"])
            results["formats"] = dict(ordered)
        return results


class Training:
    """One training stage: its metrics, line by line, and its totals."""

    def __init__(self, run: RunData, stage: str) -> None:
        self.stage = stage
        self.manifest = run.manifests[stage]
        self.result = run.result(stage, "result.json")
        self.rows = read_metrics(run.directories[stage] / "metrics.jsonl")
        self._run = run

    def curve(self, *names: str) -> list[tuple[float, float]]:
        """(step, value) of the first of the named metrics that was recorded; values that are no numbers left out."""
        for name in names:
            points = [
                (float(row["step"]), float(row[name]))
                for row in self.rows
                if _is_number(row.get("step")) and _is_number(row.get(name))
            ]
            if points:
                return points
        return []

    def total(self, *names: str) -> float | None:
        """A total from result.json, or else the last value in the metrics."""
        for name in names:
            if _is_number(self.result.get(name)):
                return float(self.result[name])
        points = self.curve(*names)
        return points[-1][1] if points else None

    @property
    def tokens(self) -> int:
        """Tokens that went through the model, padding included."""
        return int(self.total("tokens") or 0)

    @property
    def supervised_tokens(self) -> int:
        """Those of them whose prediction was learnt."""
        return int(self.total("supervised_tokens") or self.tokens)

    @property
    def seq_len(self) -> int:
        """Length of the rows trained on; the mean over tokens where it changed."""
        if mean := self.total("row_tokens"):
            return round(mean)
        found = _find(self.manifest["key"]["config"], "seq_len")
        return int(found) if _is_number(found) else 0

    @property
    def compute(self) -> TrainingCompute | None:
        """FLOPs by the formula; None without a model or tokens."""
        model = self._run.model
        if not (model and self.tokens and self.seq_len):
            return None
        return training_compute(model, self.tokens, self.supervised_tokens, self.seq_len)


def _find(config: Mapping[str, Any], name: str) -> Any:
    """A value by its name at any depth of a configuration."""
    if name in config:
        return config[name]
    for value in config.values():
        if isinstance(value, dict) and (found := _find(value, name)) is not None:
            return found
    return None


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """JSON Lines. A last line cut short by a kill is left out; a step done again after a resume counts once."""
    rows: dict[Any, dict[str, Any]] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and _is_number(row.get("step")):
                rows[row["step"]] = rows.get(row["step"], {}) | row
    return [rows[step] for step in sorted(rows)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
