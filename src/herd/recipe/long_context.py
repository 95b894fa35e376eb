"""A model for a longer context, with grids of the numbers that it finds there: the extend stage, and `herd extend`.

stage-4096/        what `herd.pretrain.extending` writes: the text, the trained model; its grid is in needle/
before/            the first model's grid at the same lengths, where several are asked for
checkpoint/        the last stage's model, as every stage that trains leaves one (a recipe's stage only)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from herd import checkpoint
from herd.errors import HerdError, MissingDependency
from herd.evaluate.needle import NeedleConfig, PromptMaker
from herd.files import read_json, write_json
from herd.pretrain.extension import ExtendConfig, plan_extension
from herd.recipe.needle_grid import NeedleGrid
from herd.train.announce import announce


class LongContextConfig(ExtendConfig, NeedleGrid):
    """An extension, and the grids of needles that it is judged by."""

    to: int = Field(default=4096, ge=2, le=2**32, description="tokens of context to reach")

    def training(self) -> ExtendConfig:
        """What the training of the stages is told."""
        return ExtendConfig.model_validate({name: getattr(self, name) for name in ExtendConfig.model_fields})


class ExtendStageConfig(LongContextConfig):
    """The extend stage of a recipe."""

    init_from: str | None = Field(
        default=None, min_length=1, description="the checkpoint to extend; null: the base stage's"
    )


def lengthen(config: LongContextConfig, model: str | Path, corpus: Path, out: Path) -> dict[str, Any]:
    """Extend `model` on a corpus folder's text; returns the data of extension.json, on rank 0 with "before" where it
    was asked. Every rank calls it.

    Raises what `herd.pretrain.extending.extend` does.
    """
    from herd.pretrain.extending import extend
    from herd.train.world import current_world

    def found(path: Path, context: int, place: Path) -> float:
        results = _found(config.grid(context), path, place)
        announce(_told(results, place))
        return _least_found(results)

    if config.needles:
        _check_grids(config, model)
    state: dict[str, Any] = {}
    if config.lengths > 1 and config.needles:
        state["before"] = current_world().first(lambda: _before(config, model, out))
    asked = config.grid(config.to).model_dump(mode="json", exclude={"lengths"}) | {"lengths": config.lengths}
    return extend(model, config.to, corpus, out, config.training(), found, asked=asked) | state


def extend_stage(config: LongContextConfig, model: Path, corpus: Path, out: Path) -> str:
    """Run the stage and leave its model in checkpoint/; says in a line what came out.

    Raises HerdError where a criterion is not met: what comes after would build on a model that lost something.
    """
    from herd.train.world import current_world

    state = lengthen(config, model, corpus, out)
    if state["stopped"]:
        raise HerdError(
            f"the extension stopped {state['stopped']}",
            fix="other steps, lr or chats; or less asked of it: needles, tolerance",
        )
    current_world().first(lambda: _leave(Path(state["model"]), out / "checkpoint"))
    last = state["stages"][-1]
    said = [f"{last['plan']['context']:,} tokens", f"short text {state['short_before']:.3f} → {last['short']:.3f}"]
    if "needles" in last:
        before = [f"{100 * state['before']:.0f} →"] if state.get("before") is not None else []
        where = [f"at the worst of {config.lengths} lengths"] if config.lengths > 1 else []
        said.append(" ".join(["needles", *before, f"{100 * last['needles']:.0f} %", *where]))
    return ", ".join(said)


def _check_grids(config: LongContextConfig, model: str | Path) -> None:
    """Raises UsageError where there is no haystack, or the shortest texts of a stage leave no room for it, before one
    is trained."""
    with checkpoint.open_checkpoint(checkpoint.continuing(model)) as opened:
        shape, tokenizer = opened.config, opened.tokenizer
    for stage in plan_extension(shape, config.to, config.method):
        grid = config.grid(stage.context)
        PromptMaker(tokenizer, grid).needed(grid.lengths[0])
    PromptMaker(tokenizer, config.grid(config.to)).read()


def _leave(model: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(model, place, copy_function=os.link)


def _before(config: LongContextConfig, model: str | Path, out: Path) -> float:
    """The share that the first model finds at the same lengths, read as it is, past its own context too."""
    place, grid = out / "before", config.grid(config.to)
    _begin_grid(grid, place)
    results, copy = place / "needle.json", place / "model"
    if not results.is_file() and not copy.is_dir():  # the same files, when the grid goes on
        with checkpoint.open_checkpoint(checkpoint.continuing(model)) as opened:
            shape = dataclasses.replace(opened.config, context_length=config.to)
            checkpoint.save(copy, shape, opened, tokenizer=opened.tokenizer)
    if not results.is_file():
        _found(grid, copy, place)
    shutil.rmtree(copy, ignore_errors=True)
    return _least_found(read_json(results))


def _begin_grid(grid: NeedleConfig, place: Path) -> None:
    """Leave nothing of another grid in its folder, whether that was finished or not."""
    file, asked = place / "grid.json", grid.model_dump(mode="json")
    if not file.is_file() or read_json(file) != asked:
        shutil.rmtree(place, ignore_errors=True)
        write_json(file, asked)


def _found(grid: NeedleConfig, path: Path, place: Path) -> Mapping[str, Any]:
    """The grid's results for the model at `path`, with pictures of them in `place`."""
    from herd.engine import LLM
    from herd.evaluate.needle import run, write_page, write_png

    _begin_grid(grid, place)
    with LLM(str(path)) as llm:
        results = run(grid, llm, place)
    write_page(results, place / "needle.html")
    with contextlib.suppress(MissingDependency):
        write_png(results, place / "needle.png")
    return results


def _told(results: Mapping[str, Any], place: Path) -> str:
    """How many are found, at which length the fewest, and where that is drawn."""
    rows = results["by_length"]
    found, asked = sum(row["correct"] for row in rows), sum(row["n"] for row in rows)
    worst = min(rows, key=lambda row: row["score"])
    fewest = f", fewest at {worst['length']:,} tokens: {worst['correct']} of {worst['n']}" if len(rows) > 1 else ""
    return f"needles: {found} of {asked} found{fewest} ({place / 'needle.html'})"


def _least_found(results: Mapping[str, Any]) -> float:
    """At the length with the fewest."""
    return min(float(row["score"]) for row in results["by_length"])
