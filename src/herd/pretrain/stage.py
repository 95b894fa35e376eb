"""The pretraining stage from a corpus folder to a checkpoint directory that other tools load as it is."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd import checkpoint
from herd.architecture import LlamaConfig, parameter_count, training_flops_per_token
from herd.corpus import EvaluationWindows, TokenShards
from herd.errors import HerdError, UsageError
from herd.files import write_json
from herd.pretrain.beginning import begin
from herd.pretrain.config import PretrainConfig
from herd.pretrain.data import TokenFiles, prepare
from herd.pretrain.heldout import HeldOut, score
from herd.pretrain.phases import Phases
from herd.pretrain.rows import account, mixture, phase_rows
from herd.pretrain.source import PhasedSource
from herd.train.batches import Batch
from herd.train.budget import TimeLimit, within
from herd.train.callbacks import Callback
from herd.train.config import TrainConfig
from herd.train.export import export
from herd.train.losses import next_token_loss
from herd.train.trainer import Trainer, TrainResult, pick_device
from herd.train.world import World, current_world

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer


def run(
    config: PretrainConfig, shape: LlamaConfig, corpus: str | Path, tokenizer: Tokenizer, out_dir: str | Path
) -> dict[str, Any]:
    """Train a model of this shape on corpus/train.jsonl and return the data of result.json.

    Writes into `out_dir`: checkpoint/ (Hugging Face layout with the tokenizer), metrics.jsonl, result.json, and what it
    needs to continue after an interruption: tokens/, state/, plan.json. Called again it continues; what is trained to
    the end is only scored again. With `init_from` it begins with a checkpoint's weights; the checkpoint's shape must be
    this one, but for context and RoPE. Raises UsageError where shape, tokenizer and rows contradict each other,
    ResourceError when `max_minutes` is too short for this machine.
    """
    started = time.monotonic()
    out, train = Path(out_dir), resolved(config)
    _check(config, shape, tokenizer)
    world, phases = current_world(train.parallel, pick_device(train).type), config.sizes()
    _check_mesh(train, shape, phases, world)
    files = _token_files(world, config, Path(corpus), tokenizer, out / "tokens")
    model, begun_from = begin(config, shape, tokenizer)
    rows = mixture(config, files.sources)
    source = PhasedSource(
        phases, phase_rows(config, rows, files.train.eos_id), train.micro_batch_rows, world, begun_from
    )
    callbacks: list[Callback] = []
    if config.max_minutes is not None:
        along, at_end = files.scored_tokens(config.evaluations)
        limit, plan = 60 * config.max_minutes, out / "plan.json"
        train = within(limit, train)
        callbacks.append(TimeLimit(limit, plan, started=started, scored_along=along, scored_at_end=at_end))
    if files.probe is not None and config.evaluations:
        callbacks.append(HeldOut(_windows(files.probe, train), config.evaluations))
    loop: Trainer[Batch] = Trainer(model, next_token_loss, source, train, out, callbacks, world=world)
    outcome = loop.fit()
    export(
        loop,
        lambda weights: checkpoint.save(
            out / "checkpoint", shape, weights, format="hf", dtype=config.save_dtype, tokenizer=tokenizer
        ),
    )
    result: dict[str, Any] = {
        **outcome.to_dict(),
        **account(config, rows, files.sources, loop.cursor),
        **_flops(outcome, shape, phases, loop.cursor),
        "parameters": parameter_count(shape),
        "corpus_tokens": files.train.n_tokens,
        "left_out_documents": files.left_out,
        "batch_tokens": train.batch_tokens,
        "precision": str(loop.precision).removeprefix("torch."),
        "compiled": loop.blocks.active,
        "stage_seconds": time.monotonic() - started,
    }
    if files.heldout is not None:
        final = score(loop, _windows(files.heldout, train))
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


def _check_mesh(train: TrainConfig, shape: LlamaConfig, phases: Phases, world: World) -> None:
    """Raises UsageError for a phase whose rows the ranks cannot share, before the first one is trained."""
    tokens = train.micro_batch_rows * train.seq_len
    if train.parallel.needs_mesh:
        for phase in phases:
            rows = phase.micro_batch(tokens)
            train.parallel.check(shape, phase.seq_len, phase.batch_size, rows, world.size)


def _token_files(
    world: World, config: PretrainConfig, corpus: Path, tokenizer: Tokenizer, directory: Path
) -> TokenFiles:
    """Rank 0 makes the files, then all open them."""

    def files() -> TokenFiles:
        row = min(phase.seq_len for phase in config.sizes())
        return prepare(corpus, tokenizer, directory, config.probe_tokens, config.parts, config.seed, row)

    made, failure = None, None
    try:
        made = files() if world.rank == 0 else None
    except (HerdError, OSError) as error:
        failure = error
    if world.any(failure is not None):
        raise failure or HerdError("rank 0 could not prepare the token files, and says why")
    return made or files()


def _flops(outcome: TrainResult, shape: LlamaConfig, phases: Phases, steps: int) -> dict[str, Any]:
    """FLOPs and MFU where rows change their length: the loop counts attention as in rows of the first length."""
    if len(phases) == 1 or not outcome.tokens or not outcome.training_flops:
        return {}
    share, read = outcome.supervised_tokens / outcome.tokens, phases.tokens_before(steps)
    bounds = [min(phase.first_token, read) for phase in phases] + [read]
    total = sum(
        (end - begin) * training_flops_per_token(shape, phase.seq_len, share)
        for phase, (begin, end) in zip(phases, itertools.pairwise(bounds), strict=True)
    )
    ratio = total / outcome.training_flops
    return {"training_flops": total, "mfu": None if outcome.mfu is None else outcome.mfu * ratio}


def _windows(shards: TokenShards, train: TrainConfig) -> EvaluationWindows:
    return EvaluationWindows(shards, train.seq_len, train.micro_batch_rows)
