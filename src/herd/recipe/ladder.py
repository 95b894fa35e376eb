"""A scaling ladder trained through a recipe: the same corpus and vocabulary, one pretraining stage for every rung.

All rungs share one run directory. What is done is skipped and what was stopped goes on, as in any run; ladder.jsonl
has a line for each finished rung, ready for `herd scaling fit`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from herd.config import parse_config
from herd.errors import UsageError
from herd.files import atomic_write, read_json
from herd.pretrain.scaling import LadderConfig, Rung, plan
from herd.recipe.compute import training_compute
from herd.recipe.loading import Recipe
from herd.recipe.runner import run
from herd.recipe.shape import ModelShape
from herd.recipe.stage import Stage
from herd.recipe.tokenise import TokenizerConfig
from herd.train.config import TrainConfig
from herd.train.launch import Ranks
from herd.train.schedule import warmup_steps

LADDER_FILE = "ladder.jsonl"
_SHARED = ("corpus", "tokenizer")


def plan_ladder(recipe: Recipe, config: LadderConfig, vocab_size: int | None = None) -> list[Rung]:
    """The rungs for a recipe's context, rows and vocabulary (by default as large as the recipe asks for).

    Learning rates are the recipe's at the size of its own model. Raises UsageError, also for phases, and for a warm-up
    or annealing that takes more than half of a rung.
    """
    missing = [name for name in (*_SHARED, "base") if name not in recipe.stages]
    if missing:
        raise UsageError(f"{recipe.source}: a ladder needs the stage {missing[0]!r}")
    base = recipe.stages["base"]
    model = parse_config(ModelShape, base.get("model") or {}, f"{recipe.source}: base.model")
    if vocab_size is None:
        where = f"{recipe.source}: tokenizer"
        vocab_size = parse_config(TokenizerConfig, recipe.stages["tokenizer"], where).vocab_size
    train = _train(recipe)
    rungs = plan(config, model.to_llama(vocab_size), train.seq_len)
    _check_steps(train, base.get("phases") or (), min(rung.steps for rung in rungs))
    return rungs


def _check_steps(train: TrainConfig, phases: Sequence[Any], fewest: int) -> None:
    """Raises UsageError for what would make a rung's steps, or their rates, others than its law is of."""
    if phases:
        raise UsageError("the rungs of a ladder have rows of one length", value="base.phases", fix="base.phases=[]")
    for name, steps in (("warmup", warmup_steps(fewest, train)), ("anneal", train.anneal)):
        if steps > fewest // 2:
            raise UsageError(
                f"base.train.{name} is for a longer run",
                value=f"{steps:,} steps",
                allowed=f"half of the smallest rung's {fewest:,} steps",
                fix=f"base.train.{name}={0.01 if name == 'warmup' else 0}",
            )


def rung_recipe(recipe: Recipe, rung: Rung) -> Recipe:
    """The recipe of one rung: the shared stages as they are, and `base` with the rung's shape, batch and steps."""
    base, train = recipe.stages["base"], _train(recipe)
    rates = {
        name: float(f"{rate * rung.lr_scale:.4g}")
        for name, rate in (("lr", train.lr), ("muon_lr", train.muon_lr))
        if rate is not None
    }
    # A schedule of its own length would end somewhere else on every rung.
    size: dict[str, Any] = {"steps": rung.steps, "batch_size": rung.batch_size, "schedule_steps": None}
    if train.micro_batch is not None:
        size["micro_batch"] = min(train.micro_batch, rung.batch_size)
    stages = {name: recipe.stages[name] for name in _SHARED}
    stages["base"] = {
        **base,
        "model": {**(base.get("model") or {}), **rung.to_dict()["model"]},
        "train": {**(base.get("train") or {}), **size, **rates},
        "max_minutes": None,  # a limit would lower the steps that spend the budget
    }
    return dataclasses.replace(recipe, name=f"{recipe.name[:40]}-{rung.name}", stages=stages)


def run_ladder(
    recipe: Recipe,
    config: LadderConfig,
    table: Sequence[Stage],
    run_dir: str | Path,
    *,
    command: str,
    on_rung: Callable[[Rung, dict[str, Any] | None], None] = lambda rung, row: None,
) -> list[dict[str, Any]]:
    """Train every rung that is not done yet; write ladder.jsonl and return its rows.

    `on_rung` hears of each rung as it starts (None) and as it is done (its row). `command` is quoted in errors as the
    way to go on. Raises UsageError before anything trains where the corpus holds nothing out, and as `run` does.
    """
    run_dir = Path(run_dir)
    plan_ladder(recipe, config)  # what is wrong shows before the corpus is read
    shared = dataclasses.replace(recipe, stages={name: recipe.stages[name] for name in _SHARED})
    state = run(shared, table, run_dir, command=command)
    corpus, words = (run_dir / state["stages"][name]["directory"] for name in _SHARED)
    heldout = corpus / "heldout.jsonl"
    if not heldout.is_file() or not heldout.stat().st_size:
        raise UsageError(
            "a ladder compares losses on held-out text, and there is none", fix="corpus.heldout_fraction=0.04"
        )
    rungs = plan_ladder(recipe, config, read_json(words / "results.json")["vocab_size"])
    rows: list[dict[str, Any]] = []
    for rung in rungs:
        on_rung(rung, None)
        state = run(rung_recipe(recipe, rung), table, run_dir, command=command)
        rows.append(_row(rung, run_dir / state["stages"]["base"]["directory"]))
        if Ranks().leads:
            with atomic_write(run_dir / LADDER_FILE, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        on_rung(rung, rows[-1])
    return rows


def _row(rung: Rung, directory: Path) -> dict[str, Any]:
    result = read_json(directory / "result.json")
    compute = training_compute(rung.shape, result["tokens"], result["supervised_tokens"], rung.seq_len)
    return {
        "name": rung.name,
        "flops": compute.flops,
        "params": result["parameters"],
        "tokens": result["tokens"],
        "loss": result["heldout_loss"],
        "epochs": round(result["epochs"], 3),
        "seconds": round(result["stage_seconds"], 1),
        "directory": directory.name,
    }


def _train(recipe: Recipe) -> TrainConfig:
    return parse_config(TrainConfig, recipe.stages["base"].get("train") or {}, f"{recipe.source}: base.train")
