"""Supervised fine-tuning: a base model learns to answer, from dialogues whose answers real Python gave.

Cross entropy on what the assistant says, its end-of-turn token included; everything else has weight 0 (Llama 3,
section 4.1.3). Dialogues are packed whole into rows and never see each other. A share of pretraining text keeps what
the base model knew. The loop is `herd.train.Trainer`; an interrupted run continues where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from herd import checkpoint
from herd.align.dialogs import Dialog, dialogs
from herd.align.examples import encode, rehearse
from herd.align.exercises import generate
from herd.architecture import parameter_count
from herd.config import Config
from herd.corpus import PackedExamples, pack_examples
from herd.files import atomic_write, write_json
from herd.model import Llama
from herd.train import Batch, PackedSource, TrainConfig, Trainer, next_token_loss
from herd.train.budget import TimeLimit, within
from herd.train.export import export
from herd.train.filling import stored
from herd.train.trainer import pick_device
from herd.train.world import current_world

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer


class SftTrainConfig(TrainConfig):
    """The training loop's knobs with the defaults for fine-tuning a model of a few million parameters.

    The paper's 1e-5 is for 405 billion; small models want, and bear, a hundred times that."""

    lr: float = Field(default=1.5e-3, gt=0, le=1, description="peak learning rate of AdamW")
    steps: int = Field(default=1000, ge=1, description="optimiser steps in all, where epochs is null")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        default="linear", description=TrainConfig.model_fields["schedule"].description
    )
    final_lr_ratio: float = Field(default=0.02, ge=0, le=1, description="learning rate at the last step / peak")


class SftConfig(Config):
    """What is learnt, how often, and how."""

    seed: int = Field(
        default=0, ge=0, lt=2**31, description="of the exercises, their dialogues and the order of the data"
    )
    exercises: int = Field(default=20_000, ge=1, le=10_000_000, description="different exercises")
    kinds: tuple[str, ...] | None = Field(default=None, description="kinds of exercises; null: all")
    max_turns: int = Field(default=4, ge=1, le=64, description="most questions in one dialogue; half of them have one")
    system_share: float = Field(default=0.05, ge=0, le=1, description="share of dialogues with a system prompt")
    rehearsal_share: float = Field(
        default=0.1, ge=0, lt=1, description="share of pretraining text among the tokens seen"
    )
    epochs: float | None = Field(default=2.5, gt=0, description="passes over the data; null: train.steps decides")
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        description="time for the whole stage: steps are lowered to what this machine can do in it",
    )
    save_dtype: Literal["f32", "bf16"] = Field(default="f32", description="number format of the saved checkpoint")
    train: SftTrainConfig = Field(default_factory=SftTrainConfig, description="the training loop")


def run(
    config: SftConfig,
    base: str | Path,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    rehearsal: Iterable[str] = (),
) -> dict[str, Any]:
    """Fine-tune the checkpoint `base` and write into `out_dir`: checkpoint/ (Hugging Face layout), metrics.jsonl,
    dialogs.jsonl (what was learnt) and result.json, whose data is returned. Called again it continues.

    rehearsal: texts to draw the share of pretraining text from; without any, the share is 0.
    Raises UsageError if rows are longer than the model's context, HerdError if a dialogue is longer than a row."""
    started = time.monotonic()
    out = Path(out_dir)
    with checkpoint.open_checkpoint(base) as opened:
        shape = opened.config
    config.train.check_context(shape.context_length)
    exercises = generate(config.seed, config.exercises, "train", kinds=config.kinds)
    conversations = dialogs(exercises, seed=config.seed, max_turns=config.max_turns, system_share=config.system_share)
    world = current_world(config.train.parallel, pick_device(config.train).type)
    if world.rank == 0:
        _write_dialogs(out / "dialogs.jsonl", conversations)
    spoken = [encode(tokenizer, dialog) for dialog in conversations]
    repeated = rehearse(tokenizer, rehearsal, spoken, config.rehearsal_share, config.train.seq_len, config.seed)
    rows = pack_examples(
        spoken + repeated, config.train.seq_len, config.train.batch_size, config.seed, pad_id=tokenizer.pad_id
    )
    train = _resolved(config, rows)
    limits = []
    if config.max_minutes is not None:
        train = within(60 * config.max_minutes, train)
        limits.append(TimeLimit(60 * config.max_minutes, out / "plan.json", started=started))
    source = PackedSource(rows, train.micro_batch_rows, world)
    with torch.device("meta"):
        llama = Llama(shape)
    with checkpoint.open_checkpoint(base) as opened:
        loop: Trainer[Batch] = Trainer(
            llama, next_token_loss, source, train, out, limits, world=world, weights=stored(opened)
        )
    outcome = loop.fit()
    export(
        loop,
        lambda weights: checkpoint.save(
            out / "checkpoint", shape, weights, format="hf", dtype=config.save_dtype, tokenizer=tokenizer
        ),
    )
    result: dict[str, Any] = {
        **outcome.to_dict(),
        "exercises": len(exercises),
        "dialogs": len(conversations),
        "dialog_tokens": sum(len(ids) for ids, _ in spoken),
        "answer_tokens": sum(sum(mask) for _, mask in spoken),
        "rehearsal_tokens": sum(len(ids) for ids, _ in repeated),
        "epochs": outcome.steps * train.batch_size / rows.rows_per_epoch,
        "parameters": parameter_count(shape),
        "batch_tokens": train.batch_tokens,
        "precision": str(loop.precision).removeprefix("torch."),
        "compiled": loop.blocks.active,
        "stage_seconds": time.monotonic() - started,
    }
    if world.rank == 0:
        write_json(out / "result.json", result)
    world.barrier()
    return result


def _resolved(config: SftConfig, rows: PackedExamples) -> TrainConfig:
    """The loop's configuration with the stage's seed and the number of steps that the epochs make."""
    if config.epochs is None:
        return config.train.model_copy(update={"seed": config.seed})
    steps = max(1, round(config.epochs * rows.rows_per_epoch / config.train.batch_size))
    return config.train.model_copy(update={"seed": config.seed, "steps": steps})


def _write_dialogs(path: Path, conversations: Sequence[Dialog]) -> None:
    with atomic_write(path, "w") as file:
        for dialog in conversations:
            file.write(json.dumps({"messages": dialog}, ensure_ascii=False) + "\n")
