"""The pretraining stage from a corpus folder to a checkpoint directory that other tools load as it is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd import checkpoint
from herd import model as models
from herd.architecture import LlamaConfig, parameter_count
from herd.corpus import EvaluationWindows, PackedDataset, TokenShards
from herd.errors import UsageError
from herd.files import write_json
from herd.pretrain.config import PretrainConfig
from herd.pretrain.data import prepare
from herd.pretrain.heldout import HeldOut, score
from herd.train.batches import Batch, PackedSource
from herd.train.budget import TimeLimit, within
from herd.train.callbacks import Callback
from herd.train.config import TrainConfig
from herd.train.losses import next_token_loss
from herd.train.trainer import Trainer

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer


def run(
    config: PretrainConfig, shape: LlamaConfig, corpus: str | Path, tokenizer: Tokenizer, out_dir: str | Path
) -> dict[str, Any]:
    """Train a new model of this shape on corpus/train.jsonl and return the data of result.json.

    Writes into `out_dir`: checkpoint/ (Hugging Face layout with the tokenizer), metrics.jsonl, result.json, and what it
    needs to continue after an interruption: tokens/, state/, plan.json. Called again it continues; what is trained to
    the end is only scored again. Raises UsageError where shape, tokenizer and rows contradict each other,
    ResourceError when `max_minutes` is too short for this machine.
    """
    started = time.monotonic()
    out = Path(out_dir)
    train = config.train.model_copy(update={"seed": config.seed})
    _check(train, shape, tokenizer)
    files = prepare(Path(corpus), tokenizer, out / "tokens", config.probe_tokens)
    model = models.Llama(shape)
    model.init_weights(config.seed)
    rows = PackedDataset(files.train, train.seq_len, train.batch_size, config.seed, config.packing)
    source = PackedSource(rows, train.micro_batch_rows)
    callbacks: list[Callback] = []
    if config.max_minutes is not None:
        along, at_end = files.scored_tokens(config.evaluations)
        limit, plan = 60 * config.max_minutes, out / "plan.json"
        train = within(limit, train)
        callbacks.append(TimeLimit(limit, plan, started=started, scored_along=along, scored_at_end=at_end))
    if files.probe is not None and config.evaluations:
        callbacks.append(HeldOut(_windows(files.probe, train), config.evaluations))
    loop: Trainer[Batch] = Trainer(model, next_token_loss, source, train, out, callbacks)
    outcome = loop.fit()
    checkpoint.save(
        out / "checkpoint",
        shape,
        models.state_arrays(model),
        format="hf",
        dtype=config.save_dtype,
        tokenizer=tokenizer,
    )
    result: dict[str, Any] = {
        **outcome.to_dict(),
        "parameters": parameter_count(shape),
        "epochs": outcome.steps * train.batch_size / rows.rows_per_epoch,
        "corpus_tokens": files.train.n_tokens,
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
    write_json(out / "result.json", result)
    return result


def _check(train: TrainConfig, shape: LlamaConfig, tokenizer: Tokenizer) -> None:
    if shape.vocab_size < tokenizer.vocab_size:
        raise UsageError(
            "the model's vocabulary is smaller than the tokenizer's",
            value=shape.vocab_size,
            allowed=f"at least {tokenizer.vocab_size}",
        )
    train.check_context(shape.context_length)


def _windows(shards: TokenShards, train: TrainConfig) -> EvaluationWindows:
    return EvaluationWindows(shards, train.seq_len, train.micro_batch_rows)
