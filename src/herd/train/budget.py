"""How many steps fit into the time there is: measured on the machine at hand, decided once, then fixed.

The learning-rate schedule must know its length in advance, so the number of steps cannot follow the clock during
training. It is planned from a few real steps that leave no trace, and written to plan.json: a resumed run reads it
from there and trains the same steps.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from herd.errors import FileFormatError, ResourceError
from herd.files import read_json, write_json
from herd.train.config import TrainConfig
from herd.train.trainer import Trainer

TRIALS = 5
SCORING = 0.5
"""Time to score a held-out token / time to train on one: a third by arithmetic, 0.3 to 0.45 measured."""
MARGIN = 0.95
"""Share of the remaining time that is planned for: machines slow down more often than they speed up."""
FEWEST_STEPS = 10


def planned(trial: Trainer[Any], plan_file: Path, deadline: float, scored_tokens: int = 0) -> TrainConfig:
    """The configuration of `trial` with as many steps, at most its own, as fit before `deadline` (monotonic seconds).

    scored_tokens: held-out tokens that go through the model in the same time. Decided once and kept in `plan_file`.
    Raises ResourceError when the time is too short for any training, FileFormatError for a damaged plan.
    """
    plan = read_plan(plan_file)
    if plan is not None:
        return apply_plan(trial.config, plan, plan_file)
    per_step = step_seconds(trial)
    left = deadline - time.monotonic() - SCORING * per_step / trial.config.batch_tokens * scored_tokens
    steps = fitting_steps(left, per_step, trial.config.steps)
    final = trial.config.model_copy(update={"steps": steps, "compile": "on" if trial.blocks.active else "off"})
    write_plan(plan_file, final, per_step, left)
    return final


def step_seconds(trainer: Trainer[Any], trials: int = TRIALS) -> float:
    """Median seconds of a training step, compiling left out. Weights, optimiser and cursor are as before.

    The steps are real ones at learning rate 0, on the first data of the run.
    """
    trainer.compile()
    trainer.optimizer.set_lr(0.0)
    seconds = []
    for trial in range(trials + 1):
        start = time.perf_counter()
        trainer.gradients(trial)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    trainer.optimizer.reset()
    return statistics.median(seconds[1:])


def fitting_steps(seconds_left: float, per_step: float, most: int) -> int:
    """Steps that fit, at most `most`. Raises ResourceError when not even a few do."""
    steps = int(MARGIN * seconds_left / per_step)
    if steps < min(FEWEST_STEPS, most):
        raise ResourceError(
            f"only {max(steps, 0)} training steps of {per_step:.1f} s fit into the time",
            value=f"{max(seconds_left, 0):.0f} s left",
            fix="raise max_minutes, or train a smaller model or smaller batches",
        )
    return min(steps, most)


def read_plan(path: Path) -> dict[str, Any] | None:
    """The plan of an earlier call in the same directory, if there is one."""
    return dict(read_json(path)) if path.exists() else None


def write_plan(path: Path, config: TrainConfig, per_step: float, seconds_left: float) -> None:
    """Fix the plan: `config` is the loop's final configuration."""
    plan = {"steps": config.steps, "compile": config.compile, "step_seconds": per_step, "seconds_left": seconds_left}
    write_json(path, plan)


def apply_plan(config: TrainConfig, plan: dict[str, Any], path: Path) -> TrainConfig:
    """`config` with the planned steps and compilation. Raises FileFormatError for a plan that is none."""
    steps, compile_ = plan.get("steps"), plan.get("compile")
    if not isinstance(steps, int) or not 1 <= steps <= config.steps or compile_ not in ("on", "off"):
        raise FileFormatError(
            "is not a plan for this configuration", file=path, field="steps", fix=f"remove {path.parent}"
        )
    return config.model_copy(update={"steps": steps, "compile": compile_})
