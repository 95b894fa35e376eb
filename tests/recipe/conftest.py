"""Three small real stages: `words` copies the words of a folder, `count` counts them, `square` reads both.

Every run of a stage writes a line into calls.txt beside the run directory, so tests see what really ran.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import Field

from herd.architecture import LlamaConfig, tensor_shapes
from herd.checkpoint import save
from herd.config import Config
from herd.evaluate import statistics
from herd.files import write_json
from herd.recipe import Decision, Stage, StageContext
from herd.recipe.hashing import digest, fingerprint_paths
from herd.recipe.manifest import begin, finish
from herd.recipe.measure import Usage
from herd.recipe.report import ReportConfig


class WordsConfig(Config):
    sources: list[Path] = Field(description="folders of text", min_length=1)
    lower: bool = Field(default=False, description="lower-case every word")


class CountConfig(Config):
    top: int = Field(default=3, ge=1, description="how many words to keep")
    steps: int = Field(default=4, ge=1, description="steps of work, each recorded in progress.txt")
    seed: int = Field(default=0, ge=0, description="of nothing, but recorded")


class SquareConfig(Config):
    power: float = Field(default=2.0, description="exponent")


@dataclass
class Workshop:
    """The stages, and a switch that makes one of them raise after some of its steps."""

    root: Path
    fail_with: BaseException | None = None
    fail_at_step: int = 2
    versions: dict[str, int] = field(default_factory=dict)

    @property
    def calls(self) -> list[str]:
        file = self.root / "calls.txt"
        return file.read_text().split() if file.exists() else []

    def _called(self, name: str) -> None:
        with open(self.root / "calls.txt", "a") as file:
            file.write(name + "\n")

    def words(self, config: WordsConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> str:
        self._called("words")
        words = [
            word for root in config.sources for file in sorted(root.rglob("*.txt")) for word in file.read_text().split()
        ]
        (out / "words.json").write_text(json.dumps([word.lower() if config.lower else word for word in words]))
        return f"{len(words)} words"

    def count(self, config: CountConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> str:
        self._called("count")
        state = out / "state" / "progress.txt"
        state.parent.mkdir(exist_ok=True)
        for step in range(len(state.read_text().split()) if state.exists() else 0, config.steps):
            if self.fail_with is not None and step == self.fail_at_step:
                raise self.fail_with
            with open(state, "a") as file:
                file.write(f"{step}\n")
        counts = Counter(json.loads((inputs["words"] / "words.json").read_text())).most_common(config.top)
        (out / "checkpoint").mkdir(exist_ok=True)
        write_json(out / "checkpoint" / "counts.json", dict(counts))
        write_json(out / "steps.json", state.read_text().split())
        return f"{len(counts)} words kept"

    def square(self, config: SquareConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> str:
        self._called("square")
        counts = json.loads((inputs["count"] / "checkpoint" / "counts.json").read_text())
        write_json(out / "squares.json", {word: n**config.power for word, n in counts.items()})
        return f"seed {context.recipe.seed}"

    def words_to_model(self, config: SquareConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> str:
        """Stands for a training stage: it leaves a checkpoint directory."""
        write_json(out / "checkpoint" / "model.json", [name for name in sorted(inputs)])
        return "a model"

    def manifest(self, state: Mapping[str, Any], stage: str, run_dir: Path) -> dict[str, Any]:
        """The manifest of a stage of a run, read with the standard library."""
        file = run_dir / state["stages"][stage]["directory"] / "stage.json"
        loaded: dict[str, Any] = json.loads(file.read_text())
        return loaded

    def table(self) -> list[Stage]:
        return [
            Stage("words", WordsConfig, self.words, version=self.versions.get("words", 1),
                  fingerprint=lambda config: fingerprint_paths(list(config.sources))),
            Stage("count", CountConfig, self.count, inputs=("words",), resumes=True),
            Stage("square", SquareConfig, self.square, inputs=("count",), optional_inputs=("words",)),
        ]  # fmt: skip


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("the cat and the dog and the bird")
    (notes / "b.txt").write_text("The end")
    return Workshop(tmp_path)


@pytest.fixture
def recipe_file(workshop: Workshop) -> Path:
    file = workshop.root / "small.yaml"
    file.write_text(
        "name: small\nseed: 5\ndescription: counts words\nstages:\n"
        f"  words: {{sources: ['{workshop.root / 'notes'}']}}\n"
        "  count: {top: 2}\n"
        "  square:\n"
    )
    return file


HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> & \x1b[31m \u202e \ufeff | `"


def write_stage(
    run_dir: Path, stage: str, files: Mapping[str, object], config: Mapping[str, object], seconds: float
) -> str:
    """A finished stage directory with these files, and its manifest as the runner writes it; returns its name."""
    key = {"stage": stage, "version": 1, "config": dict(config), "inputs": {}, "external": None}
    full = digest(key)
    directory = run_dir / f"{stage}-{full[:8]}"
    manifest = begin(directory, Decision("run", "new"), key, full, {})
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl"):
            assert isinstance(content, list)
            (directory / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            write_json(directory / name, content)
    finish(directory, manifest, Usage(seconds, seconds * 1.9, 3 * 10**8), f"what {stage} made")
    return directory.name


def metrics(steps: int, start: float, end: float) -> list[dict[str, float]]:
    """Rows as a trainer writes them, of a loss that falls with noise; every 50th step has a held-out loss."""
    noise = random.Random(0)
    rows = []
    for step in range(1, steps + 1):
        level = end + (start - end) * math.exp(-5 * step / steps)
        row = {
            "step": step,
            "loss": level * (1 + noise.gauss(0, 0.02)),
            "lr": 3e-3 * min(step / 50, 1 - step / (steps + 1)),
            "grad_norm": 0.3 + noise.random() + (40 if step == steps // 3 else 0),
            "tokens_per_second": 15_000 + noise.gauss(0, 300),
            "mfu": 0.31,
            "tokens": step * 8192,
        }
        rows.append(row | ({"heldout_loss": level * 1.03} if step % 50 == 0 else {}))
    return rows


def trained(rows: list[dict[str, float]]) -> dict[str, object]:
    """The files of a training stage."""
    return {"metrics.jsonl": rows, "result.json": {"tokens": rows[-1]["tokens"]}}


def proportion(correct: int, n: int) -> dict[str, float]:
    """A share with its intervals, as the evaluation writes it."""
    return dataclasses.asdict(statistics.proportion(correct, n))


def evaluation() -> dict[str, object]:
    """results.json of an evaluation with invented figures, and with samples that try to break out of the page."""

    def matches(scale: float) -> dict[str, object]:
        kinds = {"addition": ("easy", 0.98), "slices": ("medium", 0.7), "functions": ("hard", 0.4)}
        by_kind = {
            name: proportion(round(100 * top * scale), 100) | {"difficulty": level}
            for name, (level, top) in kinds.items()
        }
        correct = sum(int(entry["correct"]) for entry in by_kind.values())
        return {
            "style": "chat",
            "overall": proportion(correct, 300),
            "macro": correct / 300,
            "by_kind": by_kind,
            "by_difficulty": {str(entry["difficulty"]): entry for entry in by_kind.values()},
        }

    return {
        "version": 1,
        "models": ["base", "sft"],
        "bits_per_byte": {
            name: {"bits_per_byte": bits, "nats": 1.0, "tokens": 9, "bytes": 411_000, "documents": 25,
                   "context": 512, "overlap": 256, "nats_per_token": 2.4}
            for name, bits in (("base", 1.312), ("sft", 1.401))
        },
        "compressors": {name: {"original": 411_000, "size": 1, "bits_per_byte": bits}
                        for name, bits in (("xz -9e", 1.92), ("zstd -19", 2.01), ("bzip2 -9", 1.98))},
        "exact_match": {"base": matches(0.0), "base, few-shot": matches(0.05), "sft": matches(1.0)},
        "comparison": {"before": "base", "after": "sft", "n": 300, "both_right": 0, "both_wrong": 92, "gained": 208,
                       "lost": 0, "difference": 0.693, "ci95": 0.052, "p_value": 4.9e-63},
        "samples": {
            "base": [{"prompt": "def ", "completion": "write(self, data):\n    self.file.write(data)\n"},
                     {"prompt": "The ", "completion": HOSTILE}],
            "sft": [{"prompt": "class Stack:\n", "completion": "    def __init__(self):\n        self.items = []\n"}],
        },
        "dialogs": [
            {"kind": "addition", "difficulty": "easy", "question": "What is 17 + 25?", "answer": "42",
             "said": {"base": "\n\n", "sft": "42"}},
            {"kind": "slices", "difficulty": "medium", "question": HOSTILE, "answer": "'cb'",
             "said": {"base": "", "sft": HOSTILE}},
        ],
    }  # fmt: skip


SHAPE = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=64, vocab_size=320, context_length=64
)


def write_checkpoint(path: Path) -> None:
    """A real checkpoint directory with random weights."""
    numbers = np.random.default_rng(0)
    shapes = tensor_shapes(SHAPE).items()
    save(path, SHAPE, ((name, numbers.normal(0, 0.02, shape).astype(np.float32)) for name, shape in shapes))


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A run directory of all stages in the formats the rooms write. The figures are invented; the model's are true."""
    run_dir = tmp_path / "runs" / "pocket"
    steps = [
        {"name": name, "documents_in": before, "bytes_in": b0, "documents_out": after, "bytes_out": b1,
         "reasons": {reason: {"documents": before - after, "bytes": b0 - b1, "examples": []}} if before > after else {}}
        for name, before, b0, after, b1, reason in (
            ("read", 0, 0, 1022, 12_400_000, ""),
            ("exact duplicates", 1022, 12_400_000, 998, 12_290_000, "exact duplicate"),
            ("quality", 998, 12_290_000, 911, 10_900_000, "code.max_digits"),
        )
    ]  # fmt: skip
    stats = {
        "sources": {}, "steps": steps, "train_documents": 880, "train_bytes": 10_500_000, "heldout_documents": 25,
        "heldout_bytes": 411_000, "heldout_groups": ["asyncio", "<json>"], "split": "module",
        "max_overlap": 0.3, "config": {"sources": ["python-stdlib"]},
    }  # fmt: skip
    tokens = {"vocab_size": 4096, "specials": 16, "longest": ["                ", "self.assert"],
              "train": {"bytes": 10_500_000, "tokens": 2_800_000, "bytes_per_token": 3.75},
              "heldout": {"bytes": 411_000, "tokens": 112_000, "bytes_per_token": 3.67}}  # fmt: skip
    train = {"train": {"seq_len": 512}}
    quantised = {"source": "f32", "bytes": 200_000, "documents": 11, "formats": {
        "f32": {
            "file": "checkpoint", "bytes": 20_900_000, "bits_per_weight": 32.0,
            "bits_per_byte": 1.4012, "tokens_per_s": 900.0,
        },
        "q8_0": {
            "file": "model-q8_0.gguf", "bytes": 5_600_000, "bits_per_weight": 8.6,
            "bits_per_byte": 1.4014, "tokens_per_s": 2500.0,
        },
        "q4_0": {
            "file": "model-q4_0.gguf", "bytes": 3_000_000, "bits_per_weight": 4.7,
            "bits_per_byte": 1.4391, "tokens_per_s": 3100.0,
        },
    }}  # fmt: skip
    names = {
        "corpus": write_stage(run_dir, "corpus", {"stats.json": stats}, {"sources": ["python-stdlib"]}, 21.3),
        "tokenizer": write_stage(run_dir, "tokenizer", {"results.json": tokens}, {"vocab_size": 4096}, 4.2),
        "base": write_stage(run_dir, "base", trained(metrics(900, 8.3, 2.3)), train, 478.0),
        "sft": write_stage(run_dir, "sft", trained(metrics(200, 3.0, 0.4)), train, 110.5),
        "evaluate": write_stage(run_dir, "evaluate", {"results.json": evaluation()}, {"exercises": 300}, 61.0),
        "quantise": write_stage(run_dir, "quantise", {"results.json": quantised}, {"formats": ["q8_0", "q4_0"]}, 14.0),
        "report": write_stage(run_dir, "report", {}, ReportConfig().model_dump(mode="json"), 2.0),
    }  # fmt: skip
    for stage in ("base", "sft"):
        write_checkpoint(run_dir / names[stage] / "checkpoint")
    state = {
        "name": "pocket", "seed": 0, "recipe": "recipes/pocket.yaml", "command": "herd run recipes/pocket.yaml",
        "order": list(names), "description": "A test.",
        "model": f"{names['sft']}/checkpoint",
        "stages": {name: {"directory": folder, "hash": "", "status": "done"} for name, folder in names.items()},
    }  # fmt: skip
    write_json(run_dir / "run.json", state)
    return run_dir
