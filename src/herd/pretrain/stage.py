"""The pretraining stage from a corpus folder to a checkpoint directory that other tools load as it is."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from herd import checkpoint
from herd import model as models
from herd.architecture import LlamaConfig, parameter_count, training_flops_per_token
from herd.corpus import EvaluationWindows, TokenShards
from herd.errors import UsageError
from herd.files import write_json
from herd.pretrain.beginning import begin
from herd.pretrain.config import PretrainConfig
from herd.pretrain.data import TokenFiles, heldout_parts, prepare
from herd.pretrain.heldout import HeldOut, score_parts
from herd.pretrain.phases import Phases
from herd.pretrain.promoting import Promote, Promotion
from herd.pretrain.rows import account, mixture, phase_rows
from herd.pretrain.source import PhasedSource, RowLength
from herd.train.batches import Batch
from herd.train.budget import TimeLimit, within
from herd.train.callbacks import Callback
from herd.train.config import TrainConfig
from herd.train.distillation import DistilConfig, Distillation, load_teacher
from herd.train.export import Arrays, Exports, export
from herd.train.losses import next_token_loss
from herd.train.trainer import LossFunction, Trainer, TrainResult, compute_dtype, pick_device
from herd.train.world import World, current_world

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer


def run(
    config: PretrainConfig,
    shape: LlamaConfig,
    corpus: str | Path,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    distil: DistilConfig | None = None,
    promote: Promote | None = None,
) -> dict[str, Any]:
    """Train a model of this shape on corpus/train.jsonl, with `distil` also on what teachers make of it, with `promote`
    only as far as each phase is promoted; and return the data of result.json.

    Writes into `out_dir`: checkpoint/ (Hugging Face layout with the tokenizer), exports/ (such copies on the way, if
    asked for), metrics.jsonl, result.json, and what it needs to continue after an interruption: tokens/, state/,
    plan.json; with `promote` promotion.json, and unpromoted/ (a copy of what was not promoted). Called again it
    continues; what is trained to the end is only scored again. With `init_from` it begins with a checkpoint's weights;
    the checkpoint's shape must be this one, but for context and RoPE. Raises UsageError where shape, tokenizer,
    teachers and rows contradict each other, ResourceError when `max_minutes` is too short for this machine, HerdError
    where a phase is not promoted.
    """
    started = time.monotonic()
    out, train = Path(out_dir), resolved(config)
    _check(config, shape, tokenizer)
    world, phases = current_world(train.parallel, pick_device(train).type), config.sizes()
    judged_by = None if promote is None else _judged_by(config, promote)
    config.check_layout(shape, world.size, judged_by and judged_by[0])
    loss, taught = _loss(config, shape, train, distil, world)
    files = _token_files(world, config, Path(corpus), tokenizer, out / "tokens")
    rows = mixture(config, files.sources)
    callbacks: list[Callback] = [RowLength(phases)]
    if config.max_minutes is not None:
        along, at_end = files.scored_tokens(config.evaluations)
        limit, plan = 60 * config.max_minutes, out / "plan.json"
        train = within(limit, train)
        callbacks.append(TimeLimit(limit, plan, started=started, scored_along=along, scored_at_end=at_end))
    if files.probe is not None and config.evaluations:
        callbacks.append(HeldOut(_windows(files.probe, train), config.evaluations))

    def save(place: Path, weights: Arrays) -> None:
        checkpoint.save(place, shape, weights, format="hf", dtype=config.save_dtype, tokenizer=tokenizer)

    if config.export_every:
        callbacks.append(
            Exports(config.export_every, lambda step, weights: save(out / "exports" / f"step-{step:08d}", weights))
        )
    if promote is not None and judged_by is not None:
        short_row, first = judged_by
        short, steps = _short_windows(files.probe, train, short_row), train.steps - train.anneal
        callbacks.append(Promotion(promote, phases, steps, short, first, out, save))
    with begin(config, shape, tokenizer) as (weights, begun_from):
        parts = phase_rows(config, rows, files.train.eos_id)
        source = PhasedSource(phases, parts, train.micro_batch_rows, world, begun_from + taught)
        with torch.device("meta"):
            model = models.Llama(shape)
        loop: Trainer[Batch] = Trainer(model, loss, source, train, out, callbacks, world=world, weights=weights)
    outcome = loop.fit()
    export(loop, lambda weights: save(out / "checkpoint", weights))
    result: dict[str, Any] = {
        **outcome.to_dict(),
        **account(config, rows, files.sources, loop.cursor),
        **_flops(outcome, shape, phases, loop.cursor),
        "parameters": parameter_count(shape),
        **({} if distil is None else {"teachers": list(distil.teachers)}),
        "corpus_tokens": files.train.n_tokens,
        "left_out_documents": files.left_out,
        "batch_tokens": train.batch_tokens,
        "precision": str(loop.precision).removeprefix("torch."),
        "compiled": loop.blocks.active,
        "stage_seconds": time.monotonic() - started,
    }
    if files.heldout is not None:
        split = heldout_parts(Path(corpus), config.sources)
        final, each = score_parts(loop, {name: _windows(files.heldout, train, only) for name, only in split.items()})
        for name, values in each.items():
            result["sources"][name] |= values
        if not loop.logged("heldout_loss"):
            loop.log(final)
        result |= final
    if world.rank == 0:
        write_json(out / "result.json", result)
    world.barrier()
    return result


def resolved(config: PretrainConfig) -> TrainConfig:
    """The loop's configuration: with the stage's seed, and the average over exactly the annealing steps."""
    changes: dict[str, Any] = {"seed": config.seed}
    if config.train.anneal and config.anneal.average:
        changes |= {"average": "tail", "tail": config.train.anneal / config.train.steps}
    return config.train.model_copy(update=changes)


def _check(config: PretrainConfig, shape: LlamaConfig, tokenizer: Tokenizer) -> None:
    if shape.vocab_size < tokenizer.vocab_size:
        raise UsageError(
            "the model's vocabulary is smaller than the tokenizer's",
            value=shape.vocab_size,
            allowed=f"at least {tokenizer.vocab_size}",
        )
    config.train.model_copy(update={"seq_len": config.longest_row}).check_context(shape.context_length)


def _loss(
    config: PretrainConfig, shape: LlamaConfig, train: TrainConfig, distil: DistilConfig | None, world: World
) -> tuple[LossFunction[Batch], str]:
    """What a step lowers, and what of it belongs to the run's identity beside its first weights."""
    if distil is None:
        return next_token_loss, ""
    if config.max_minutes is not None:
        raise UsageError("steps with teachers cannot be planned by max_minutes: give train.steps alone")
    device = pick_device(train)
    precision = compute_dtype(train, device)
    teachers = [load_teacher(checkpoint.continuing(name), world, device, precision) for name in distil.teachers]
    loss = Distillation(teachers, distil.weight, shape.vocab_size, train.parallel)
    return loss, f", taught by {distil.model_dump_json()}"


def _token_files(
    world: World, config: PretrainConfig, corpus: Path, tokenizer: Tokenizer, directory: Path
) -> TokenFiles:
    """Rank 0 makes the files, then all open them."""

    def files() -> TokenFiles:
        row = min(phase.seq_len for phase in config.sizes())
        return prepare(corpus, tokenizer, directory, config.probe_tokens, config.parts, config.seed, row)

    made = world.first(files)
    return made or files()


def _flops(outcome: TrainResult, shape: LlamaConfig, phases: Phases, steps: int) -> dict[str, Any]:
    """FLOPs, MFU and a token's mean row where rows change their length: the loop counts all as of the last length."""
    if len(phases) == 1 or not outcome.tokens or not outcome.training_flops:
        return {}
    share, read = outcome.supervised_tokens / outcome.tokens, phases.tokens_before(steps)
    bounds = [min(phase.first_token, read) for phase in phases] + [read]
    parts = [
        (end - begin, phase.seq_len) for phase, (begin, end) in zip(phases, itertools.pairwise(bounds), strict=True)
    ]
    total = sum(tokens * training_flops_per_token(shape, length, share) for tokens, length in parts)
    return {
        "training_flops": total,
        "mfu": None if outcome.mfu is None else outcome.mfu * total / outcome.training_flops,
        "row_tokens": sum(tokens * length for tokens, length in parts) / read,
    }


def _judged_by(config: PretrainConfig, promote: Promote) -> tuple[int, LlamaConfig]:
    """Tokens of the windows that short text is read in, and the model whose weights the run begins with. Raises
    UsageError where phases cannot be judged, or by such windows."""
    if why := config.why_not_judged():
        raise UsageError(f"promote: {why}")
    assert config.init_from is not None  # else that was why
    with checkpoint.open_checkpoint(checkpoint.continuing(config.init_from)) as opened:
        first = opened.config
    short = promote.short or min(config.train.seq_len, first.context_length)
    if short > first.context_length:
        most = f"1 to {first.context_length}, the context of {config.init_from}"
        raise UsageError("promote.short is more than the first model reads", value=short, allowed=most)
    return short, first


def _short_windows(probe: TokenShards | None, train: TrainConfig, tokens: int) -> EvaluationWindows:
    """The probe in windows of so many tokens, as many of them at a time as make up a micro-batch."""
    if probe is None:
        raise UsageError("promote judges by held-out text, and there is none", fix="corpus.heldout_fraction=0.01")
    return EvaluationWindows(probe, tokens, max(1, train.micro_batch_rows * train.seq_len // tokens))


def _windows(shards: TokenShards, train: TrainConfig, only: list[int] | None = None) -> EvaluationWindows:
    return EvaluationWindows(shards, train.seq_len, train.micro_batch_rows, only=only)
