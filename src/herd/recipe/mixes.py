"""The table behind a mixing law, made through a recipe: its `base` stage trained on one mix of its sources after the
other, with the same corpus, vocabulary, model and steps.

All mixes share one run directory. What is done is skipped and what was stopped goes on; mixes.jsonl has a line for
each finished mix, ready for `herd scaling mix`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from herd.config import parse_config
from herd.corpus.config import CorpusConfig
from herd.errors import UsageError
from herd.files import atomic_write, read_json
from herd.pretrain.config import Source
from herd.pretrain.data import heldout_parts
from herd.pretrain.scaling.mixes import LOSS, WEIGHT
from herd.recipe.loading import Recipe
from herd.recipe.runner import run
from herd.recipe.stage import Stage
from herd.train.launch import Ranks

MIXES_FILE = "mixes.jsonl"
_SHARED = ("corpus", "tokenizer")


def own_mix(recipe: Recipe) -> dict[str, float]:
    """The shares of the sources in the recipe's `base` stage. Raises UsageError for one that mixes nothing, or whose
    weights change along the way."""
    missing = [name for name in (*_SHARED, "base") if name not in recipe.stages]
    if missing:
        raise UsageError(f"{recipe.source}: mixes need the stage {missing[0]!r}")
    base = recipe.stages["base"]
    sources = _sources(recipe)
    if len(sources) < 2:
        raise UsageError(
            f"{recipe.source}: base.sources has nothing to mix",
            value=", ".join(sources) or "no sources",
            allowed="two sources or more",
            fix="base.sources={code: {weight: 1, kind: code}, prose: {weight: 1, kind: prose}}",
        )
    if base.get("mix") or (base.get("anneal") or {}).get("weights"):
        raise UsageError(f"{recipe.source}: weights that change along the way (mix, anneal.weights) are no mix")
    total = sum(source.weight for source in sources.values())
    if not total > 0:
        raise UsageError(f"{recipe.source}: base.sources: at least one weight must be above 0")
    return {name: source.weight / total for name, source in sources.items()}


def mix_recipe(recipe: Recipe, number: int, mix: Mapping[str, float]) -> Recipe:
    """The recipe of one mix: the shared stages as they are, and `base` with these weights and all of its steps."""
    base = recipe.stages["base"]
    sources = {name: {**base["sources"][name], "weight": weight} for name, weight in mix.items()}
    stages = {name: recipe.stages[name] for name in _SHARED}
    stages["base"] = {**base, "sources": sources, "max_minutes": None}  # a limit would give the mixes unequal steps
    return dataclasses.replace(recipe, name=f"{recipe.name[:40]}-mix{number}", stages=stages)


def run_mixes(
    recipe: Recipe,
    mixes: Sequence[Mapping[str, float]],
    table: Sequence[Stage],
    run_dir: str | Path,
    *,
    command: str,
    on_mix: Callable[[int, Mapping[str, float], dict[str, Any] | None], None] = lambda number, mix, row: None,
) -> list[dict[str, Any]]:
    """Train every mix that is not done yet; write mixes.jsonl and return its rows.

    `on_mix` hears of each mix as it starts (None) and as it is done (its row). `command` is quoted in errors as the way
    to go on. Raises UsageError before anything trains where a source has no held-out text, and as `run` does.
    """
    run_dir = Path(run_dir)
    own_mix(recipe)  # what is wrong shows before the corpus is read
    shared = dataclasses.replace(recipe, stages={name: recipe.stages[name] for name in _SHARED})
    state = run(shared, table, run_dir, command=command)
    domains = _domains(recipe, run_dir / state["stages"]["corpus"]["directory"])
    rows: list[dict[str, Any]] = []
    for number, mix in enumerate(mixes, 1):
        on_mix(number, mix, None)
        state = run(mix_recipe(recipe, number, mix), table, run_dir, command=command)
        rows.append(_row(mix, domains, run_dir / state["stages"]["base"]["directory"]))
        if Ranks().leads:
            with atomic_write(run_dir / MIXES_FILE, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        on_mix(number, mix, rows[-1])
    return rows


def _sources(recipe: Recipe) -> dict[str, Source]:
    given = recipe.stages["base"].get("sources") or {}
    return {
        name: parse_config(Source, values, f"{recipe.source}: base.sources.{name}") for name, values in given.items()
    }


def _domains(recipe: Recipe, corpus: Path) -> list[str]:
    """The sources that have held-out text: all those whose documents the corpus has."""
    sources = _sources(recipe)
    share = (recipe.stages.get("corpus") or {}).get("heldout_fraction", CorpusConfig().heldout_fraction)
    file = corpus / "heldout.jsonl"
    found = heldout_parts(corpus, sources) if file.is_file() else {}
    for name, source in sources.items():
        if not source.shards and name not in found:
            raise UsageError(
                f"mixes are compared by held-out text of each source, and {name!r} has none",
                fix=f"corpus.heldout_fraction={min(0.5, 3 * share or 0.1):g}, or more documents of it",
            )
    if not any(found):
        raise UsageError("mixes are compared by held-out text of the corpus's sources, and all sources are shards")
    return [name for name in sources if name in found]


def _row(mix: Mapping[str, float], domains: Sequence[str], directory: Path) -> dict[str, Any]:
    result = read_json(directory / "result.json")
    parts = result["sources"]
    unscored = [name for name in domains if "heldout_loss" not in parts[name]]
    if unscored:
        raise UsageError(
            f"{directory} was trained by a version that did not score the held-out text of {unscored[0]!r}",
            fix="take another --out",
        )
    return {
        "name": " ".join(f"{name}={weight:g}" for name, weight in mix.items()),
        "flops": result["training_flops"],
        "params": result["parameters"],
        "tokens": result["tokens"],
        **{WEIGHT + name: weight for name, weight in mix.items()},
        **{LOSS + name: parts[name]["heldout_loss"] for name in domains},
        **{f"epochs.{name}": round(parts[name]["epochs"], 3) for name in mix},
        "loss": result["heldout_loss"],
        "seconds": round(result["stage_seconds"], 1),
        "directory": directory.name,
    }
